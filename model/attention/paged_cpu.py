"""Attention of few queries over a paged cache on a CPU, compiled by numba for the machine at hand.

torch's attention takes one sequence a call and is, at one query, far from the speed of the memory. Here all
sequences of a step are one parallel region a layer, and blocks are read where they lie. A work item is a sequence
and a group of its heads: scores of all its keys go to scratch, then through a softmax, then the values are summed.
Keys and values are read token by token, all heads of the group side by side, as they lie in memory: head by head
takes twice as long. All arithmetic is float32, whatever
the cache holds; what is not a number stays so.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from model.attention.base import AttentionMetadata
from model.compiled import (
    REASSOCIATE,
    as_float32,
    compile_region,
    exp2,
    largest,
    narrow,
    parallel_region,
    pointer,
    prefetch,
    structure,
    take_next,
)

ARGUMENTS = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("num_sequences", "num_tokens", "num_blocks", "blocks_per_sequence"),
            *("num_heads", "num_kv_heads", "num_groups", "scratch_per_thread"),
            *("query", "query_stride", "out"),
            *("kv_layer", "block_table", "query_starts", "seq_lens", "scratch"),
            *("next_item", "next_thread"),
        )
    ]
)
"""What a parallel region works on: sizes, the addresses of the arrays, and those of the two counters."""
_Arguments = structure(ARGUMENTS)

AHEAD = 8
"""Tokens by which keys and values are asked for beforehand where a thread reads some heads only: what it skips
between two tokens keeps the processor from guessing."""
CACHE_LINE = 64
LOG2_E = 1.4426950408889634


class PagedAttention:
    """A compiled kernel for one head dimension, block size and precision of activations. Keeps scratch memory."""

    def __init__(self, head_dim: int, block_size: int, dtype: torch.dtype) -> None:
        """Compiles the kernel, once for each kind: about two seconds. dtype: bfloat16 or float32."""
        self._kernel = compile_attention(head_dim, block_size, dtype == torch.bfloat16)
        self._scratch = torch.empty(0)

    def __call__(self, query: Tensor, kv_layer: Tensor, metadata: AttentionMetadata, num_sequences: int) -> Tensor:
        """The first `num_sequences` sequences attend causally, bottom-right, to what the cache holds.

        query: [T, H, D]; kv_layer: [2, N, P, Hkv, D], contiguous; of one dtype.
        -> [T, H, D], of which other sequences' rows are not written.
        """
        query = query if query.stride()[1:] == (query.shape[2], 1) else query.contiguous()
        num_threads = torch.get_num_threads()
        num_tokens, num_heads, head_dim = query.shape
        num_kv_heads = kv_layer.shape[3]
        block_table = metadata.block_table
        groups = num_groups(num_kv_heads, num_threads, num_sequences)
        longest = block_table.shape[1] * kv_layer.shape[2]
        scratch_per_thread = num_heads // groups * (longest + 2 * head_dim)
        if self._scratch.numel() < num_threads * scratch_per_thread:
            self._scratch = torch.empty(num_threads * scratch_per_thread)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        counters = (ctypes.c_int64 * 2)()
        arguments = _Arguments(
            *(num_sequences, num_tokens, kv_layer.shape[1], block_table.shape[1]),
            *(num_heads, num_kv_heads, groups, scratch_per_thread),
            *(query.data_ptr(), query.stride(0), out.data_ptr()),
            *(kv_layer.data_ptr(), block_table.data_ptr()),
            *(metadata.query_starts.data_ptr(), metadata.seq_lens_device.data_ptr(), self._scratch.data_ptr()),
            *(ctypes.addressof(counters), ctypes.addressof(counters) + 8),
        )
        region = parallel_region()
        assert region is not None, "the backend is chosen only where torch has this runtime"
        region(self._kernel, ctypes.addressof(arguments), num_threads, 0)
        return out


def num_groups(num_kv_heads: int, num_threads: int, num_sequences: int) -> int:
    """As few as give every thread an item: a divisor of the KV heads."""
    return next(
        (n for n in range(1, num_kv_heads) if num_kv_heads % n == 0 and n * num_sequences >= num_threads),
        num_kv_heads,
    )


@cache
def compile_attention(head_dim: int, block_size: int, is_bfloat16: bool) -> int:
    """-> address of a C function that takes a pointer to ARGUMENTS. Constants to the compiler, these."""
    scale = LOG2_E / head_dim**0.5
    kind = np.int16 if is_bfloat16 else np.float32

    @compile_region(ARGUMENTS)
    def region(arguments: Any) -> None:
        a = carray(arguments, 1)[0]
        kv_width = a.num_kv_heads * head_dim
        query = carray(pointer(a.query), a.num_tokens * a.query_stride, kind)
        out = carray(pointer(a.out), (a.num_tokens, a.num_heads * head_dim), kind)
        keys_values = carray(pointer(a.kv_layer), (2, a.num_blocks * block_size * kv_width), kind)
        block_table = carray(pointer(a.block_table), (a.num_sequences, a.blocks_per_sequence), np.int32)
        query_starts = carray(pointer(a.query_starts), a.num_sequences + 1, np.int32)
        seq_lens = carray(pointer(a.seq_lens), a.num_sequences, np.int32)
        heads, kv_heads = a.num_heads // a.num_groups, a.num_kv_heads // a.num_groups
        width, width_kv = heads * head_dim, kv_heads * head_dim
        share = heads // kv_heads
        memory = a.scratch + 4 * take_next(a.next_thread) * a.scratch_per_thread
        scores = carray(pointer(memory), (heads, a.blocks_per_sequence * block_size), np.float32)
        q = carray(pointer(memory + 4 * scores.size), width, np.float32)
        o = carray(pointer(memory + 4 * (scores.size + width)), width, np.float32)
        while True:
            item = take_next(a.next_item)
            if item >= a.num_sequences * a.num_groups:
                break
            row, group = item // a.num_groups, item % a.num_groups
            first, shift = group * width, group * width_kv
            blocks = block_table[row]
            ahead = AHEAD if a.num_groups > 1 else 0
            for token in range(query_starts[row], query_starts[row + 1]):
                for i in range(width):
                    q[i] = as_float32(query[token * a.query_stride + first + i])
                length = seq_lens[row] - (query_starts[row + 1] - 1 - token)
                _score(
                    q, keys_values[0], kv_width, shift, blocks, length, share, scores, head_dim, block_size, ahead
                )
                for head in range(heads):
                    _softmax(scores[head, :length], np.float32(scale))
                _sum(scores, keys_values[1], kv_width, shift, blocks, length, share, o, head_dim, block_size, ahead)
                for i in range(width):
                    out[token, first + i] = narrow(o[i]) if is_bfloat16 else o[i]

    return region


@njit(fastmath=REASSOCIATE, error_model="numpy")
def _score(
    query: Any,
    keys: Any,
    width: int,
    shift: int,
    blocks: Any,
    length: int,
    group: int,
    scores: Any,
    head_dim: int,
    block_size: int,
    ahead: int,
) -> None:
    """scores[head, i] = query[head] . keys[i]."""
    for i in range(length):
        token = (np.int64(blocks[i // block_size]) * block_size + i % block_size) * width + shift
        if ahead > 0:
            _ask_for(keys, min(i + ahead, length - 1), blocks, block_size, width, shift, query.shape[0] // group)
        for head in range(scores.shape[0]):
            start = token + head // group * head_dim
            key = keys[start : start + head_dim]
            q = query[head * head_dim : (head + 1) * head_dim]
            dot = np.float32(0)
            for d in range(head_dim):
                dot += q[d] * as_float32(key[d])
            scores[head, i] = dot


@njit(fastmath=REASSOCIATE, error_model="numpy")
def _sum(
    weights: Any,
    values: Any,
    width: int,
    shift: int,
    blocks: Any,
    length: int,
    group: int,
    out: Any,
    head_dim: int,
    block_size: int,
    ahead: int,
) -> None:
    """out[head] = sum over i of weights[head, i] values[i]."""
    out[:] = 0
    for i in range(length):
        token = (np.int64(blocks[i // block_size]) * block_size + i % block_size) * width + shift
        if ahead > 0:
            _ask_for(values, min(i + ahead, length - 1), blocks, block_size, width, shift, out.shape[0] // group)
        for head in range(weights.shape[0]):
            start = token + head // group * head_dim
            value = values[start : start + head_dim]
            o = out[head * head_dim : (head + 1) * head_dim]
            weight = weights[head, i]
            for d in range(head_dim):
                o[d] += weight * as_float32(value[d])


@njit(inline="always")
def _ask_for(cache: Any, i: int, blocks: Any, block_size: int, width: int, shift: int, size: int) -> None:
    """Prefetch a group's heads of token i."""
    start = (np.int64(blocks[i // block_size]) * block_size + i % block_size) * width + shift
    for offset in range(0, size, CACHE_LINE // cache.itemsize):
        prefetch(cache, start + offset)


@njit(fastmath=REASSOCIATE, error_model="numpy")
def _softmax(scores: Any, scale: Any) -> None:
    """In place: 2^(scale (score - largest)), then normalised."""
    most = largest(scores)
    total = np.float32(0)
    for i in range(scores.shape[0]):
        scores[i] = exp2((scores[i] - most) * scale)
        total += scores[i]
    for i in range(scores.shape[0]):
        scores[i] /= total
