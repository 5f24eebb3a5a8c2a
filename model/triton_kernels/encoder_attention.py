"""Attention of the encoder: every frame of a clip sees every frame of it, and no other clip.

A program takes a tile of one clip's queries for one head. Clips are found on the device from where they begin, and
the grid follows from the number of frames and clips alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.triton_kernels.language import jit, tl
from model.triton_kernels.paged_prefill import SCAN, Tiling
from model.triton_kernels.softmax import LOG2_E, absorb, find_tile, fresh_state

TILINGS = {
    2: Tiling(queries=128, keys=64, num_warps=4, num_stages=3),
    4: Tiling(queries=16, keys=16, num_warps=4, num_stages=2),
}
"""By the bytes of a number."""


def encoder_attention(query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> Tensor:
    """query, key, value: [E, H, D], strides alike, the last 1; starts: int32 [clips + 1] -> [E, H, D].

    Rows past the last start are left unwritten.
    """
    assert query.stride() == key.stride() == value.stride()
    num_frames, num_heads, head_dim = query.shape
    num_clips = starts.shape[0] - 1
    tiling = TILINGS[query.element_size()]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    _kernel[num_frames // tiling.queries + num_clips, num_heads](
        query, key, value, starts, out, head_dim**-0.5 * LOG2_E, num_clips, *query.stride()[:2],
        HEAD_DIM=head_dim, QUERIES=tiling.queries, KEYS=tiling.keys, SCAN=SCAN,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
    return out


@jit(do_not_specialize=["num_clips"], do_not_specialize_on_alignment=["starts"])
def _kernel(
    query, key, value, starts, out, scale, num_clips, stride_frame, stride_head,
    HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    clip, tile = find_tile(starts, num_clips, tl.program_id(0), QUERIES, SCAN)
    if clip >= num_clips:
        return
    first = tl.load(starts + clip)
    length = tl.load(starts + clip + 1) - first
    rows = tile * QUERIES + tl.arange(0, QUERIES)
    dims = tl.arange(0, HEAD_DIM)
    is_row = rows < length
    shift = first.to(tl.int64) * stride_frame + head * stride_head
    q = tl.load(query + shift + rows[:, None] * stride_frame + dims[None], mask=is_row[:, None], other=0.0)
    keys = key + shift
    values = value + shift
    whole = length // KEYS * KEYS

    largest, total, weighted = fresh_state(QUERIES, HEAD_DIM)
    for start in range(0, whole, KEYS):
        places = start + tl.arange(0, KEYS)
        k = tl.load(keys + places[:, None] * stride_frame + dims[None])
        v = tl.load(values + places[:, None] * stride_frame + dims[None])
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        largest, total, weighted = absorb(products, scale, v, largest, total, weighted)
    if whole < length:
        places = whole + tl.arange(0, KEYS)
        inside = places < length
        k = tl.load(keys + places[:, None] * stride_frame + dims[None], mask=inside[:, None], other=0.0)
        v = tl.load(values + places[:, None] * stride_frame + dims[None], mask=inside[:, None], other=0.0)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        products = tl.where(inside[None], products, float("-inf"))
        largest, total, weighted = absorb(products, scale, v, largest, total, weighted)
    row = (first + rows).to(tl.int64) * tl.num_programs(1) + head
    weighted = (weighted / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * HEAD_DIM + dims[None], weighted, mask=is_row[:, None])
