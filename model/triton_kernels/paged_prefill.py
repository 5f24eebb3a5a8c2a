"""Causal attention of many queries a sequence over the paged cache, in which their own keys already are.

A program takes a tile of one sequence's queries for one head and walks over the keys that they see, bottom-right
aligned: the last query sees all. Tiles whose keys every query sees need no mask. Which sequence a tile belongs to is
found on the device, so a step brings no table; the longest tiles of a sequence start first.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from model.triton_kernels.language import jit, tl
from model.triton_kernels.softmax import LOG2_E, absorb, comparable, find_tile, fresh_state

SCAN = 64
"""Sequences looked at at once."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the kernel is cut. To be tuned on the device."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


TILINGS = {
    1: Tiling(queries=128, keys=64, num_warps=8, num_stages=3),
    2: Tiling(queries=128, keys=64, num_warps=8, num_stages=3),
    4: Tiling(queries=16, keys=16, num_warps=8, num_stages=2),
}
"""By the bytes of a cached number, or of float32 queries."""


def paged_prefill(
    query: Tensor,
    kv_layer: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_starts: Tensor,
    out: Tensor,
    first_sequence: int,
    first_token: int,
    kv_scales: Tensor | None = None,
) -> None:
    """Fill `out` from row first_token on, for the sequences from first_sequence on.

    query, out: [T, H, D], contiguous; kv_layer: [2, N, P, Hkv, D], any strides but the last; block_table: int32
    [B, M]; seq_lens: int32 [B]; query_starts: int32 [B + 1]; kv_scales: float32 [2, Hkv], for a cache in float8.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_sequences = seq_lens.shape[0] - first_sequence
    tiling = TILINGS[4 if query.element_size() == 4 else kv_layer.element_size()]
    num_tiles = (num_tokens - first_token) // tiling.queries + num_sequences  # as many as there can be
    _kernel[num_tiles, num_heads](
        query, kv_layer, seq_lens if kv_scales is None else kv_scales, block_table, seq_lens, query_starts, out,
        head_dim**-0.5 * LOG2_E, first_sequence, num_sequences,
        block_table.stride(0), *kv_layer.stride()[:4],
        SCALED=kv_scales is not None, GROUP=num_heads // kv_layer.shape[3], HEAD_DIM=head_dim,
        BLOCK_SIZE=kv_layer.shape[2], QUERIES=tiling.queries, KEYS=tiling.keys, SCAN=SCAN,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip


@jit(
    do_not_specialize=["first_sequence", "num_sequences", "stride_table"],
    do_not_specialize_on_alignment=["kv_scales", "block_table", "seq_lens", "query_starts"],
)
def _kernel(
    query, kv_layer, kv_scales, block_table, seq_lens, query_starts, out,
    scale, first_sequence, num_sequences,
    stride_table, stride_kv, stride_block, stride_slot, stride_head,
    SCALED: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    index, tile = find_tile(query_starts + first_sequence, num_sequences, tl.program_id(0), QUERIES, SCAN)
    if index >= num_sequences:
        return
    sequence = first_sequence + index
    first = tl.load(query_starts + sequence)
    num_queries = tl.load(query_starts + sequence + 1) - first
    length = tl.load(seq_lens + sequence)
    past = length - num_queries
    tile = tl.cdiv(num_queries, QUERIES) - 1 - tile  # the longest first

    rows, dims = tile * QUERIES + tl.arange(0, QUERIES), tl.arange(0, HEAD_DIM)
    is_row = rows < num_queries
    row = (first + rows).to(tl.int64) * num_heads + head
    q = tl.load(query + row[:, None] * HEAD_DIM + dims[None], mask=is_row[:, None], other=0.0)
    kv_head = head // GROUP
    q = comparable(q, kv_layer.dtype.element_ty)
    if SCALED:
        scale *= tl.load(kv_scales + kv_head)
    keys = kv_layer + kv_head * stride_head
    values = keys + stride_kv.to(tl.int64)
    table = block_table + sequence * stride_table
    seen_by_all = (past + tile * QUERIES + 1) // KEYS * KEYS
    stop = tl.minimum(past + (tile + 1) * QUERIES, length)

    largest, total, weighted = fresh_state(QUERIES, HEAD_DIM)
    for start in range(0, seen_by_all, KEYS):
        places = start + tl.arange(0, KEYS)
        k, v = _read(keys, values, table, places, stop, stride_block, stride_slot, q.dtype, False, BLOCK_SIZE, dims)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        largest, total, weighted = absorb(products, scale, v, largest, total, weighted)
    for start in range(seen_by_all, stop, KEYS):
        places = start + tl.arange(0, KEYS)
        k, v = _read(keys, values, table, places, stop, stride_block, stride_slot, q.dtype, True, BLOCK_SIZE, dims)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        products = tl.where(places[None] <= past + rows[:, None], products, float("-inf"))
        largest, total, weighted = absorb(products, scale, v, largest, total, weighted)
    if SCALED:
        weighted *= tl.load(kv_scales + tl.num_programs(1) // GROUP + kv_head)
    total = tl.where(length == 0, 1.0, total)  # a padding row: zeros
    weighted = (weighted / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * HEAD_DIM + dims[None], weighted, mask=is_row[:, None])


@jit
def _read(
    keys, values, table, places, stop, stride_block, stride_slot, dtype: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, dims,
):  # fmt: skip
    """Keys and values at some places of a sequence; zeros from `stop` on, if any are there. -> two of [N, D]."""
    if MASKED:
        inside = places < stop
        blocks = tl.load(table + places // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        slots = (blocks * stride_block + places % BLOCK_SIZE * stride_slot)[:, None] + dims[None]
        k = tl.load(keys + slots, mask=inside[:, None], other=0.0)
        v = tl.load(values + slots, mask=inside[:, None], other=0.0)
    else:
        blocks = tl.load(table + places // BLOCK_SIZE).to(tl.int64)
        slots = (blocks * stride_block + places % BLOCK_SIZE * stride_slot)[:, None] + dims[None]
        k = tl.load(keys + slots)
        v = tl.load(values + slots)
    return k.to(dtype), v.to(dtype)
