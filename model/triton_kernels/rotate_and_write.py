"""Rotary embedding and the write to the paged cache in one launch a layer, instead of some fifteen small ones.

A program takes one token and a group of its heads: of the queries, which it turns and stores apart, or of the keys
and values, which it turns (the keys) and stores to their slot. Products and sums are rounded to the precision of the
activations one by one, as torch's operators do. A cache in e4m3 holds value / scale, cut off at +-448; what is not
a number stays so. Slot -1 is of a padding row: its query is turned and nothing is written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.layers import apply_rotary
from model.triton_kernels.language import jit, next_power_of_2, reaches, tl

ELEMENTS = 1024
"""Of each half of a program's heads: 16 bytes a thread in bfloat16."""
E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max


def rotate_and_write(
    heads: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_layer: Tensor,
    slot_mapping: Tensor,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """Turn queries and keys, write keys and values to the cache. -> the queries, [T, H, D], contiguous.

    heads: [T, H + 2 Hkv, D], any strides but the last; cos, sin: [T, 1, D / 2]; all of one dtype.
    kv_layer: [2, N, P, Hkv, D], any strides but the last; slot_mapping: int32 [T], block * P + offset or -1;
    kv_scales: float32 [2, Hkv], by which keys and values were divided.
    """
    num_heads = heads.shape[1] - 2 * kv_layer.shape[3]
    query = heads.new_empty(heads.shape[0], num_heads, heads.shape[2])
    if reaches(heads):
        _launch(heads, cos, sin, kv_layer, slot_mapping, kv_scales, query, None)
        return query
    return rotate_and_write_plain(heads, cos, sin, kv_layer, slot_mapping, kv_scales)[0]


def rotate_write_and_keep(
    heads: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_layer: Tensor,
    slot_mapping: Tensor,
    kv_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rotate_and_write` for those who attend to the step's own tokens too.

    -> query [T, H, D], key [T, Hkv, D], both turned and contiguous, and value [T, Hkv, D], a view of `heads`.
    """
    num_kv_heads = kv_layer.shape[3]
    num_heads = heads.shape[1] - 2 * num_kv_heads
    if not reaches(heads):
        return rotate_and_write_plain(heads, cos, sin, kv_layer, slot_mapping, kv_scales)
    query = heads.new_empty(heads.shape[0], num_heads, heads.shape[2])
    key = heads.new_empty(heads.shape[0], num_kv_heads, heads.shape[2])
    _launch(heads, cos, sin, kv_layer, slot_mapping, kv_scales, query, key)
    return query, key, heads[:, num_heads + num_kv_heads :]


def rotate_and_write_plain(
    heads: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_layer: Tensor,
    slot_mapping: Tensor,
    kv_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain torch, without waiting for the device. -> what `rotate_write_and_keep` gives."""
    num_kv_heads, block_size = kv_layer.shape[3], kv_layer.shape[2]
    num_heads = heads.shape[1] - 2 * num_kv_heads
    turned = apply_rotary(heads[:, : num_heads + num_kv_heads], cos, sin)
    query, key, value = turned[:, :num_heads], turned[:, num_heads:], heads[:, num_heads + num_kv_heads :]
    written = slot_mapping >= 0
    slots = torch.where(written, slot_mapping, 0).long()  # padding rows leave the null block as it is
    blocks, offsets = slots // block_size, slots % block_size
    for index, rows in enumerate((key, value)):
        if kv_scales is not None:
            rows = (rows.float() / kv_scales[index, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
        cache = kv_layer[index]
        kept = cache[0, 0].to(rows.dtype)
        stored = torch.where(written[:, None, None], rows, kept).to(cache.dtype)
        bits = cache.view(torch.uint8) if cache.dtype.itemsize == 1 else cache  # few operators take float8
        bits[blocks, offsets] = stored.view(bits.dtype)
    return query.contiguous(), key.contiguous(), value


def _launch(
    heads: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_layer: Tensor,
    slot_mapping: Tensor,
    kv_scales: Tensor | None,
    query: Tensor,
    key: Tensor | None,
) -> None:
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = kv_layer.shape[3]
    if num_tokens == 0:
        return
    half = next_power_of_2(head_dim // 2)
    heads_at_once = max(1, min(ELEMENTS // half, next_power_of_2(max(num_heads, num_kv_heads))))
    query_groups = -(-num_heads // heads_at_once)
    _kernel[num_tokens, query_groups + -(-num_kv_heads // heads_at_once)](
        heads, cos, sin, query, query if key is None else key, kv_layer, slot_mapping,
        cos if kv_scales is None else kv_scales,
        *heads.stride()[:2], cos.stride(0), sin.stride(0), *kv_layer.stride()[:4],
        0 if kv_scales is None else kv_scales.stride(0),
        num_heads, num_kv_heads, query_groups,
        BLOCK_SIZE=kv_layer.shape[2], HALF=head_dim // 2, HALF_PADDED=half, HEADS=heads_at_once,
        KEEP_KEY=key is not None, SCALED=kv_scales is not None,
    )  # fmt: skip


@jit(do_not_specialize_on_alignment=["slot_mapping"])  # it begins anywhere in the step's one array
def _kernel(
    heads, cos, sin, query, key, kv_layer, slot_mapping, kv_scales,
    stride_token, stride_head, stride_cos, stride_sin, stride_kv, stride_block, stride_offset, stride_kv_head,
    stride_scales, num_heads, num_kv_heads, query_groups,
    BLOCK_SIZE: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, HEADS: tl.constexpr,
    KEEP_KEY: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    is_query = group < query_groups
    count = tl.where(is_query, num_heads, num_kv_heads)
    head = tl.where(is_query, group, group - query_groups) * HEADS + tl.arange(0, HEADS)[:, None]
    place = tl.arange(0, HALF_PADDED)[None, :]
    inside = (head < count) & (place < HALF)
    row = heads + token * stride_token + tl.where(is_query, 0, num_heads) * stride_head
    first = tl.load(row + head * stride_head + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(row + head * stride_head + HALF + place, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + token * stride_cos + place, mask=place < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + token * stride_sin + place, mask=place < HALF, other=0.0).to(tl.float32)
    turned_first = _difference(first, c, second, s, query.dtype.element_ty)
    turned_second = _difference(second, c, -first, s, query.dtype.element_ty)
    if is_query:
        target = query + (token * num_heads + head) * (2 * HALF) + place
        tl.store(target, turned_first.to(query.dtype.element_ty), mask=inside)
        tl.store(target + HALF, turned_second.to(query.dtype.element_ty), mask=inside)
    else:
        if KEEP_KEY:
            target = key + (token * num_kv_heads + head) * (2 * HALF) + place
            tl.store(target, turned_first.to(key.dtype.element_ty), mask=inside)
            tl.store(target + HALF, turned_second.to(key.dtype.element_ty), mask=inside)
        slot = tl.load(slot_mapping + token).to(tl.int64)
        if slot >= 0:
            target = kv_layer + (slot // BLOCK_SIZE) * stride_block + (slot % BLOCK_SIZE) * stride_offset
            target += head * stride_kv_head + place
            key_scale = 1.0
            value_scale = 1.0
            if SCALED:
                key_scale = tl.load(kv_scales + head, mask=head < count, other=1.0)
                value_scale = tl.load(kv_scales + stride_scales + head, mask=head < count, other=1.0)
            source = row + num_kv_heads * stride_head + head * stride_head + place
            first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
            second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
            _store(target, turned_first, key_scale, inside, SCALED)
            _store(target + HALF, turned_second, key_scale, inside, SCALED)
            _store(target + stride_kv.to(tl.int64), first, value_scale, inside, SCALED)
            _store(target + stride_kv.to(tl.int64) + HALF, second, value_scale, inside, SCALED)


@jit
def _difference(a, b, c, d, dtype: tl.constexpr):
    """a * b - c * d, each of the three results rounded to a precision. -> float32."""
    return ((a * b).to(dtype).to(tl.float32) - (c * d).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)


@jit
def _store(target, value, scale, mask, SCALED: tl.constexpr):
    if SCALED:
        value = tl.div_rn(value, scale)
        value = tl.where(value > 448.0, 448.0, tl.where(value < -448.0, -448.0, value))
    tl.store(target, value.to(target.dtype.element_ty), mask=mask)
