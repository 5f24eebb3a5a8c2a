"""Attention of many queries on a CPU that multiplies bfloat16, compiled by numba: prompts, chunks of them and clips.

torch does it operator by operator: scores of all heads go to memory and come back for a softmax, and again for the
product with the values. Here an item of work is a head and a few queries, whose scores stay in a core's cache. Keys
and values are first brought into the layout of `gemm_cpu`'s products. Scores are not rounded; what they weigh the
values with is, as in the reference.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from model.compiled import (
    REASSOCIATE,
    compile_region,
    exp2,
    largest,
    narrow,
    parallel_region,
    pointer,
    structure,
    take_next,
)
from model.gemm_cpu import multiply
from model.gemv_cpu import BLOCK

ARGUMENTS = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("num_queries", "num_keys", "num_heads", "num_kv_heads", "head_dim", "is_causal"),
            *("query", "query_stride", "key", "key_stride", "value", "value_stride", "out"),
            *("packed_keys", "packed_values", "scratch", "scratch_per_thread", "next_item", "next_thread"),
        )
    ]
)
"""Sizes, addresses, values from row to row of [Q, H, D] or [S, Hkv, D], and the addresses of the two counters."""
_Arguments = structure(ARGUMENTS)
QUERIES = 32
"""Of an item of work."""
LOG2_E = 1.4426950408889634


class DenseAttention:
    """The compiled kernels. Keeps scratch memory: for one thread at a time."""

    def __init__(self) -> None:
        """Compiles the kernels, once: some seconds."""
        self._pack, self._attend = compile_pack(), compile_attention()
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
        """Causal as bottom-right aligned. query: [Q, H, D]; key, value: [S, Hkv, D]; bfloat16 -> [Q, H, D]."""
        num_queries, num_heads, head_dim = query.shape
        num_keys, num_kv_heads = key.shape[:2]
        padded = -(-num_keys // BLOCK) * BLOCK
        packed_size = 2 * padded * num_kv_heads * head_dim
        per_thread = QUERIES * (6 * padded + 6 * head_dim)
        num_threads = torch.get_num_threads()
        size = 2 * packed_size + num_threads * per_thread
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=torch.uint8)
        packed = self._scratch.data_ptr()
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        counters = (ctypes.c_int64 * 2)()
        arguments = _Arguments(
            *(num_queries, num_keys, num_heads, num_kv_heads, head_dim, causal),
            *(query.data_ptr(), query.stride(0), key.data_ptr(), key.stride(0), value.data_ptr(), value.stride(0)),
            *(out.data_ptr(), packed, packed + packed_size, packed + 2 * packed_size, per_thread),
            *(ctypes.addressof(counters), ctypes.addressof(counters) + 8),
        )
        region = parallel_region()
        assert region is not None, "the backend is chosen only where torch has this runtime"
        for kernel in (self._pack, self._attend):
            counters[0] = 0
            region(kernel, ctypes.addressof(arguments), num_threads, 0)
        return out


def takes(*heads: Tensor) -> bool:
    """Whether the kernels read them. heads: [T, H, D], at least one token."""
    return all(len(x) and x.shape[2] % BLOCK == 0 and x.stride()[1:] == (x.shape[2], 1) for x in heads)


@cache
def compile_pack() -> int:
    """-> address of a C function that takes a pointer to ARGUMENTS: keys and values as blocks of columns.

    Of each head: keys [S / 64, D / 2, 64, 2], values [D / 64, S / 2, 64, 2]; zeros where there are no more keys.
    """

    @compile_region(ARGUMENTS)
    def region(arguments: Any) -> None:
        a = carray(arguments, 1)[0]
        head_dim = a.head_dim
        blocks = -(-a.num_keys // BLOCK)
        keys = carray(pointer(a.key), a.num_keys * a.key_stride // 2, np.int32)
        values = carray(pointer(a.value), a.num_keys * a.value_stride, np.int16)
        packed_keys = carray(pointer(a.packed_keys), (a.num_kv_heads, blocks, head_dim // 2, BLOCK), np.int32)
        shape = a.num_kv_heads, head_dim // BLOCK, blocks, BLOCK // 2, BLOCK
        packed_values = carray(pointer(a.packed_values), shape, np.int32)
        while True:
            item = take_next(a.next_item)
            if item >= a.num_kv_heads * blocks:
                break
            head, block = item // blocks, item % blocks
            first = block * BLOCK
            count = min(BLOCK, a.num_keys - first)
            _pack_keys(keys, first, count, a.key_stride // 2, head * head_dim // 2, packed_keys[head, block])
            for part in range(head_dim // BLOCK):
                start = head * head_dim + part * BLOCK
                _pack_values(values, first, count, a.value_stride, start, packed_values[head, part, block])

    return region


@njit(fastmath=REASSOCIATE, error_model="numpy")
def _pack_keys(words: Any, first: int, count: int, stride: int, start: int, out: Any) -> None:
    for key in range(BLOCK):
        at = (first + key) * stride + start
        for i in range(out.shape[0]):
            out[i, key] = words[at + i] if key < count else np.int32(0)


@njit(fastmath=REASSOCIATE, error_model="numpy")
def _pack_values(values: Any, first: int, count: int, stride: int, start: int, out: Any) -> None:
    for pair in range(BLOCK // 2):
        at = (first + 2 * pair) * stride + start
        if 2 * pair + 1 < count:
            low, high = values[at : at + BLOCK], values[at + stride : at + stride + BLOCK]
            for i in range(BLOCK):
                out[pair, i] = (np.int32(low[i]) & np.int32(0xFFFF)) | (np.int32(high[i]) << np.int32(16))
        elif 2 * pair < count:
            for i in range(BLOCK):
                out[pair, i] = np.int32(values[at + i]) & np.int32(0xFFFF)
        else:
            for i in range(BLOCK):
                out[pair, i] = 0


@cache
def compile_attention() -> int:
    """-> address of a C function that takes a pointer to ARGUMENTS, keys and values packed."""

    @compile_region(ARGUMENTS)
    def region(arguments: Any) -> None:
        a = carray(arguments, 1)[0]
        head_dim, padded = a.head_dim, -(-a.num_keys // BLOCK) * BLOCK
        items, width = -(-a.num_queries // QUERIES), a.num_heads * head_dim
        scale = np.float32(LOG2_E) / np.sqrt(np.float32(head_dim))
        scores_at = a.scratch + take_next(a.next_thread) * a.scratch_per_thread
        sums_at = scores_at + 4 * QUERIES * padded
        weights_at = sums_at + 4 * QUERIES * head_dim
        query_at = weights_at + 2 * QUERIES * padded
        while True:
            item = take_next(a.next_item)
            if item >= items * a.num_heads:
                break
            head = item % a.num_heads
            first = (items - 1 - item // a.num_heads) * QUERIES  # the longest first
            count = min(QUERIES, a.num_queries - first)
            visible = a.num_keys - a.is_causal * (a.num_queries - first - count)
            blocks = -(-visible // BLOCK)
            packed = 2 * (head // (a.num_heads // a.num_kv_heads)) * padded * head_dim
            for row in range(count):
                source = a.query + 2 * ((first + row) * a.query_stride + head * head_dim)
                _copy(_bfloat16(source, head_dim), _bfloat16(query_at + 2 * row * head_dim, head_dim))
            _clear(_float32(scores_at, QUERIES * padded))
            for block in range(blocks):
                keys, target = a.packed_keys + packed + 2 * block * BLOCK * head_dim, scores_at + 4 * block * BLOCK
                multiply(count, query_at, 2 * head_dim, keys, head_dim // 2, target, 4 * padded)
            _clear(_float32(sums_at, QUERIES * head_dim))
            totals = np.empty(QUERIES, np.float32)
            for row in range(count):
                length = visible - a.is_causal * (count - 1 - row)
                scores = _float32(scores_at + 4 * row * padded, length)
                totals[row] = _weigh(scores, scale, _bfloat16(weights_at + 2 * row * padded, blocks * BLOCK))
            for part in range(head_dim // BLOCK):
                values, target = a.packed_values + packed + 2 * part * BLOCK * padded, sums_at + 4 * part * BLOCK
                multiply(count, weights_at, 2 * padded, values, blocks * BLOCK // 2, target, 4 * head_dim)
            for row in range(count):
                out = _bfloat16(a.out + 2 * ((first + row) * width + head * head_dim), head_dim)
                _narrow(_float32(sums_at + 4 * row * head_dim, head_dim), np.float32(1) / totals[row], out)

    return region


@njit(inline="always")
def _bfloat16(address: int, count: int) -> Any:
    return carray(pointer(address), count, np.int16)


@njit(inline="always")
def _float32(address: int, count: int) -> Any:
    return carray(pointer(address), count, np.float32)


@njit(error_model="numpy")
def _copy(source: Any, target: Any) -> None:
    for i in range(target.shape[0]):
        target[i] = source[i]


@njit(error_model="numpy")
def _clear(target: Any) -> None:
    for i in range(target.shape[0]):
        target[i] = 0


@njit(fastmath=REASSOCIATE, error_model="numpy")
def _weigh(scores: Any, scale: Any, weights: Any) -> Any:
    """weights = 2^(scale (score - largest)), rounded, and zeros up to their end. -> their sum."""
    most = largest(scores)
    total = np.float32(0)
    for i in range(scores.shape[0]):
        value = exp2((scores[i] - most) * scale)
        scores[i] = value
        total += value
    for i in range(scores.shape[0]):
        weights[i] = narrow(scores[i])
    for i in range(scores.shape[0], weights.shape[0]):
        weights[i] = 0
    return total


@njit(fastmath=REASSOCIATE, error_model="numpy")
def _narrow(sums: Any, factor: Any, out: Any) -> None:
    for i in range(out.shape[0]):
        out[i] = narrow(sums[i] * factor)
