"""FlashAttention's functions as documented, on a CPU: they check what the real ones would refuse or misread.

Signatures are those of flash-attn 2.8, of flash-attention's `hopper`, and of torch 2.13. Each call is recorded, then
answered by dense attention in float64, rounded once. A constraint that is broken raises FlashError.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class FlashError(Exception):
    """What the real function would have said, or not noticed."""


def require(holds: bool, problem: str) -> None:
    if not holds:
        raise FlashError(problem)


def dense(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """query: [Q, H, D]; key, value: [S, Hkv, D] -> [Q, H, D] in the query's precision; zeros without keys."""
    group = query.shape[1] // key.shape[1]
    q, k, v = query.double(), *(x.double().repeat_interleave(group, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,shd->hqs", q, k) * query.shape[2] ** -0.5
    if causal:
        num_queries, length = scores.shape[1:]
        hidden = torch.arange(length)[None] > torch.arange(length - num_queries, length)[:, None]
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("hqs,shd->qhd", scores.softmax(-1), v).to(query.dtype)


def check_tensors(query: Tensor, key: Tensor, value: Tensor, *index_tensors: Tensor) -> None:
    """One device, one precision, heads that fit; int32 everywhere else."""
    require(query.dtype in (torch.float16, torch.bfloat16), f"only fp16 and bf16, not {query.dtype}")
    require(key.dtype == query.dtype == value.dtype, "query, key and value must have the same dtype")
    for x in (query, key, value):
        require(x.stride(-1) == 1, "input must have contiguous last dimension")
        require(x.shape[-1] == query.shape[-1], "one head dim")
        require(x.data_ptr() % 16 == 0, "reads 16 bytes at a time")
        require(all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1]), "reads 16 bytes at a time")
    require(query.shape[-1] % 8 == 0, "the whole cache would be copied to pad the head dim")
    require(query.shape[-1] <= 256, "head dim at most 256")
    require(key.shape == value.shape, "as many keys as values")
    require(query.shape[-2] % key.shape[-2] == 0, "heads must be a multiple of key-value heads")
    for x in index_tensors:
        require(x.dtype == torch.int32, f"must have dtype int32, has {x.dtype}")
        require(x.stride(-1) == 1, "must have contiguous last dimension")
    require(len({x.device for x in (query, key, value, *index_tensors)}) == 1, "all on one device")


def check_starts(starts: Tensor, total: int | None, longest: int) -> list[int]:
    """cu_seqlens: from 0 up, to the end. -> lengths."""
    require(
        starts.dim() == 1 and starts.is_contiguous() and starts.shape[0] > 1, "cu_seqlens: [batch + 1], contiguous"
    )
    values = starts.tolist()
    lens = [stop - start for start, stop in pairwise(values)]
    require(values[0] == 0 and min(lens) >= 0, "cu_seqlens begin at 0 and do not fall")
    require(total is None or values[-1] == total, "cu_seqlens end where the tokens end")
    require(max(lens) <= longest, f"max_seqlen {longest} is below {max(lens)}")
    return lens


def pages(cache: Tensor, table: Tensor, lens: list[int], block: int) -> Iterator[Tensor]:
    """The first `lens` tokens of each sequence. cache: [N, P, Hkv, D]; table: [B, M] -> [S, Hkv, D] each."""
    require(cache.dim() == 4, "a paged cache is [blocks, block, heads, head dim]")
    require(cache.shape[1] % block == 0, f"page block size must be divisible by {block}")
    require(table.dim() == 2 and table.shape[0] == len(lens), "one row of the block table for each sequence")
    for row, length in zip(table, lens, strict=True):
        require(length <= table.shape[1] * cache.shape[1], "longer than its row of the block table")
        used = row[: -(-length // cache.shape[1])].long()
        require(bool(((used >= 0) & (used < cache.shape[0])).all()), "a block that is not there")
        yield cache[used].flatten(0, 1)[:length]


def attend_pages(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, query_lens: list[int], lens: list[int], block: int
) -> Tensor:
    """Causal. query: [T, H, D] -> [T, H, D]."""
    keys, values = (pages(cache, table, lens, block) for cache in (key, value))
    parts = zip(query.split(query_lens), keys, values, strict=True)
    return torch.cat([dense(q, k, v, causal=True) if len(k) else torch.zeros_like(q) for q, k, v in parts])


def attend_packed(query: Tensor, key: Tensor, value: Tensor, lens: list[int], causal: bool) -> Tensor:
    """Within each of the packed sequences. [E, H, D] -> [E, H, D]."""
    parts = zip(*(x.split(lens) for x in (query, key, value)), strict=True)
    return torch.cat([dense(q, k, v, causal=causal) for q, k, v in parts])


@dataclass
class Calls:
    """What was called, in order."""

    names: list[str] = field(default_factory=list)
    arguments: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, **arguments: Any) -> None:
        self.names.append(name)
        self.arguments.append(arguments)


def fake_flash_attn() -> ModuleType:
    """The package flash-attn 2.8; `.calls` tells what was called."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        calls.add("flash_attn_varlen_func", q=q, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        assert (dropout_p, softmax_scale, softcap, alibi_slopes, return_attn_probs) == (0.0, None, 0.0, None, False)
        tables = () if block_table is None else (block_table,)
        check_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k, *tables)
        query_lens = check_starts(cu_seqlens_q, q.shape[0], max_seqlen_q)
        lens = check_starts(cu_seqlens_k, None if tables else k.shape[0], max_seqlen_k)
        require(len(lens) == len(query_lens), "as many sequences of keys as of queries")
        if tables:
            assert causal
            return attend_pages(q, k, v, block_table, query_lens, lens, 256)
        assert query_lens == lens
        return attend_packed(q, k, v, lens, causal)

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
        return_softmax_lse=False,
    ):  # fmt: skip
        calls.add("flash_attn_with_kvcache", q=q)
        assert (k, v, rotary_cos, cache_batch_idx, softmax_scale, return_softmax_lse) == (*[None] * 5, False)
        check_tensors(q, k_cache, v_cache, cache_seqlens, block_table)
        require(q.dim() == 4, "q is [batch, queries, heads, head dim]")
        require(cache_seqlens.shape == q.shape[:1] and cache_seqlens.is_contiguous(), "cache_seqlens is [batch]")
        lens = cache_seqlens.tolist()
        out = attend_pages(q.flatten(0, 1), k_cache, v_cache, block_table, [q.shape[1]] * len(lens), lens, 256)
        return out.unflatten(0, q.shape[:2])

    package, calls = ModuleType("flash_attn"), Calls()
    package.__version__ = "2.8.3"
    package.calls = calls
    package.flash_attn_varlen_func = flash_attn_varlen_func
    package.flash_attn_with_kvcache = flash_attn_with_kvcache
    return package


def fake_flash_attn_3(with_lse: bool = False) -> ModuleType:
    """flash_attn_interface; `with_lse`: as older builds were, whose varlen function gave the log-sum-exp as well."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        calls.add("flash_attn_varlen_func", q=q)
        assert (seqused_q, seqused_k, softmax_scale, qv, softcap, return_attn_probs) == (*[None] * 4, 0.0, False)
        check_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k)
        lens = check_starts(cu_seqlens_q, q.shape[0], max_seqlen_q)
        assert lens == check_starts(cu_seqlens_k, k.shape[0], max_seqlen_k)
        out = attend_packed(q, k, v, lens, causal)
        return (out, q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32)) if with_lse else out

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
        max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
        causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
        scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False,
    ):  # fmt: skip
        calls.add("flash_attn_with_kvcache", q=q, num_splits=num_splits)
        assert (k, v, qv, rotary_cos, cache_batch_idx, softmax_scale, scheduler_metadata) == (*[None] * 7,)
        check_tensors(q, k_cache, v_cache, cache_seqlens, page_table, cu_seqlens_q)
        require(0 <= num_splits <= 256, "num_splits > 256 not supported")
        require(max_seqlen_q is not None, "max_seqlen_q must be provided if cu_seqlens_q is provided")
        query_lens = check_starts(cu_seqlens_q, q.shape[0], max_seqlen_q)
        require(cache_seqlens.shape == (len(query_lens),) and cache_seqlens.is_contiguous(), "seqused_k is [batch]")
        assert causal
        return attend_pages(q, k_cache, v_cache, page_table, query_lens, cache_seqlens.tolist(), 1)

    package, calls = ModuleType("flash_attn_interface"), Calls()
    package.calls = calls
    package.flash_attn_varlen_func = flash_attn_varlen_func
    package.flash_attn_with_kvcache = flash_attn_with_kvcache
    return package


def fake_varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    """torch 2.13's torch.nn.attention.varlen.varlen_attn, with the FlashAttention 2 that is built into it."""
    assert (return_aux, scale, num_splits) == (None, None, None)
    require(cu_seq_k is not None, "cumulative lengths of queries and keys must be both set or both not set")
    tables = () if block_table is None else (block_table, seqused_k)
    check_tensors(query, key, value, cu_seq_q, cu_seq_k, *tables)
    require(enable_gqa or query.shape[1] == key.shape[-2], "enable_gqa=True for GQA")
    query_lens = check_starts(cu_seq_q, query.shape[0], max_q)
    lens = check_starts(cu_seq_k, None if tables else key.shape[0], max_k)
    require(len(lens) == len(query_lens), "as many sequences of keys as of queries")
    if not tables:
        assert window_size == (-1, -1)
        return attend_packed(query, key, value, lens, causal=False)
    assert window_size == (-1, 0)
    require(seqused_k.shape == (len(lens),) and seqused_k.is_contiguous(), "seqused_k is [batch]")
    return attend_pages(query, key, value, block_table, query_lens, seqused_k.tolist(), 256)
