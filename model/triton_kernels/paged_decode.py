"""Attention of few queries a sequence over the paged cache: it reads, and a tensor core multiplies on the side.

A program takes the queries of one sequence that share a key-value head, as 16 rows or more, the smallest tile of a
product, and one share of the sequence's keys. With one query and no groups 15 of the rows are padding, which costs
nothing: the time goes into reading. Keys come in tiles of several blocks. The grid follows from the shapes alone;
lengths are read on the device, and a share beyond a sequence's end does next to nothing. With several shares a
second kernel adds them up.

A sequence of length 0 gives zeros. What lies in slots past a sequence's end is never used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.triton_kernels.language import jit, next_power_of_2, tl
from model.triton_kernels.softmax import LOG2_E, absorb, comparable, fresh_state, settled

MIN_ROWS = 16
"""The smallest tile of a product."""

TARGET_PROGRAMS = 1024
"""Sequences are shared out until there are so many: 8 for each of an H200's 132 multiprocessors."""

MAX_SHARES = 16


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the kernel is cut. To be tuned on the device."""

    keys: int
    """In a tile."""
    num_warps: int
    num_stages: int


TILINGS = {
    1: Tiling(keys=64, num_warps=4, num_stages=3),
    2: Tiling(keys=64, num_warps=4, num_stages=3),
    4: Tiling(keys=16, num_warps=8, num_stages=3),
}
"""By the bytes of a cached number, or of float32 queries. At 128 dims a tile of keys and values is 32 KiB in
bfloat16 and two of them are under way: three programs share a multiprocessor, in float8 four."""


def num_shares(num_sequences: int, num_kv_heads: int) -> int:
    """Into how many shares the keys of each sequence are cut.

    It depends on the batch's power of two alone: a batch that is padded to a graph's size is computed as it would be
    unpadded, bit for bit.
    """
    programs = next_power_of_2(num_sequences) * num_kv_heads
    return min(MAX_SHARES, next_power_of_2(-(-TARGET_PROGRAMS // programs)))


def max_queries(num_heads: int, num_kv_heads: int) -> int:
    """Of a sequence, that the kernel takes at once."""
    group = num_heads // num_kv_heads
    return max(MIN_ROWS, next_power_of_2(group)) // group


def paged_decode(
    query: Tensor,
    kv_layer: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_starts: Tensor,
    out: Tensor,
    num_sequences: int,
    num_tokens: int,
    kv_scales: Tensor | None = None,
) -> None:
    """Fill the first num_tokens rows of `out`, which are those of the first num_sequences sequences.

    query, out: [T, H, D], contiguous; kv_layer: [2, N, P, Hkv, D], any strides but the last; block_table: int32
    [B, M]; seq_lens: int32 [B]; query_starts: int32 [B + 1]; kv_scales: float32 [2, Hkv], for a cache in float8.
    Each sequence has at most `max_queries` queries, or is a padding row of length 0.
    """
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = kv_layer.shape[3]
    shares = num_shares(num_sequences, num_kv_heads)
    group = num_heads // num_kv_heads
    tiling = TILINGS[4 if query.element_size() == 4 else kv_layer.element_size()]
    if shares == 1:
        partial = state = out
    else:
        partial = torch.empty(num_tokens, num_heads, shares, head_dim, dtype=torch.float32, device=out.device)
        state = torch.empty(num_tokens, num_heads, shares, 2, dtype=torch.float32, device=out.device)
    _kernel[num_kv_heads, num_sequences, shares](
        query, kv_layer, state if kv_scales is None else kv_scales, block_table, seq_lens, query_starts,
        partial, state, head_dim**-0.5 * LOG2_E,
        block_table.stride(0), *kv_layer.stride()[:4],
        SCALED=kv_scales is not None, SHARED=shares > 1, GROUP=group, HEAD_DIM=head_dim,
        BLOCK_SIZE=kv_layer.shape[2], ROWS=max(MIN_ROWS, next_power_of_2(group)), KEYS=tiling.keys,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
    if shares > 1:
        _reduce_kernel[num_heads, num_tokens](
            partial, state, out, shares, MAX_SHARES=MAX_SHARES, HEAD_DIM=head_dim, num_warps=2
        )


@jit(
    do_not_specialize=["stride_table"],
    do_not_specialize_on_alignment=["block_table", "seq_lens", "query_starts"],
)
def _kernel(
    query, kv_layer, kv_scales, block_table, seq_lens, query_starts, out, state, scale,
    stride_table, stride_kv, stride_block, stride_slot, stride_head,
    SCALED: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    head, sequence, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_kv_heads = tl.num_programs(0)
    length = tl.load(seq_lens + sequence)
    start, stop = _keys_of(share, length, KEYS)
    first = tl.load(query_starts + sequence)
    num_queries = tl.load(query_starts + sequence + 1) - first

    rows, dims = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    is_row = rows < num_queries * GROUP
    row = (first + rows // GROUP).to(tl.int64) * (num_kv_heads * GROUP) + head * GROUP + rows % GROUP
    last_key = length - num_queries + rows // GROUP  # that a row may see
    q = tl.load(query + row[:, None] * HEAD_DIM + dims[None], mask=is_row[:, None], other=0.0)
    q = comparable(q, kv_layer.dtype.element_ty)
    if SCALED:
        scale *= tl.load(kv_scales + head)
    keys = kv_layer + head * stride_head
    values = keys + stride_kv.to(tl.int64)

    largest, total, weighted = fresh_state(ROWS, HEAD_DIM)
    table = block_table + sequence * stride_table
    places = start + tl.arange(0, KEYS)
    blocks = tl.load(table + places // BLOCK_SIZE, mask=places < stop, other=0)
    for _ in range(start, stop, KEYS):
        inside = places < stop
        slots = blocks.to(tl.int64) * stride_block + (places % BLOCK_SIZE) * stride_slot
        following = places + KEYS
        blocks = tl.load(table + following // BLOCK_SIZE, mask=following < stop, other=0)
        k = tl.load(keys + slots[:, None] + dims[None], mask=inside[:, None], other=0.0).to(q.dtype)
        v = tl.load(values + slots[:, None] + dims[None], mask=inside[:, None], other=0.0).to(q.dtype)
        v = settled(v, kv_layer.dtype.element_ty, query.dtype.element_ty)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        products = tl.where(inside[None] & (places[None] <= last_key[:, None]), products, float("-inf"))
        largest, total, weighted = absorb(products, scale, v, largest, total, weighted)
        places = following
    if SCALED:
        weighted *= tl.load(kv_scales + num_kv_heads + head)
    largest = tl.where(length == 0, 0.0, largest)  # a padding row: zeros
    total = tl.where(length == 0, 1.0, total)
    if SHARED:
        row = row * tl.num_programs(2) + share
        _store_share(out, state, row, is_row, (start < stop) | (length == 0), largest, total, weighted, HEAD_DIM)
    else:
        weighted = (weighted / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + row[:, None] * HEAD_DIM + dims[None], weighted, mask=is_row[:, None])


@jit
def _keys_of(share, length, KEYS: tl.constexpr):
    """Whole tiles, as evenly as they go. -> the first key of a share, and the end."""
    share_len = tl.cdiv(tl.cdiv(length, KEYS), tl.num_programs(2)) * KEYS
    start = share * share_len
    return start, tl.minimum(start + share_len, length)


@jit
def _store_share(out, state, row, is_row, has_keys, largest, total, weighted, HEAD_DIM: tl.constexpr):
    """The state of each row for `_reduce_kernel`; values only of a share that has keys."""
    tl.store(state + row * 2, largest, mask=is_row)
    tl.store(state + row * 2 + 1, total, mask=is_row)
    if has_keys:
        tl.store(out + row[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None], weighted, mask=is_row[:, None])


@jit(do_not_specialize=["num_shares"])
def _reduce_kernel(partial, state, out, num_shares, MAX_SHARES: tl.constexpr, HEAD_DIM: tl.constexpr):
    """One row of `out` from its shares; those that saw no key have -inf for their largest score, and no values."""
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    dims = tl.arange(0, HEAD_DIM)
    is_share = tl.arange(0, MAX_SHARES) < num_shares
    shares = row * num_shares + tl.arange(0, MAX_SHARES)
    largest = tl.load(state + shares * 2, mask=is_share, other=float("-inf"))
    totals = tl.load(state + shares * 2 + 1, mask=is_share, other=0.0)
    is_used = largest != float("-inf")
    weighted = tl.load(partial + shares[:, None] * HEAD_DIM + dims[None], mask=is_used[:, None], other=0.0)
    reference = tl.max(largest, 0)
    reference = tl.where(reference == float("-inf"), 0.0, reference)
    factors = tl.exp2(largest - reference)
    total = tl.sum(factors * totals, 0)
    result = tl.sum(factors[:, None] * weighted, 0) / total
    tl.store(out + row * HEAD_DIM + dims, result.to(out.dtype.element_ty))
