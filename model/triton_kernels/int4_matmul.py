"""x W^T for weights of four bits that are unpacked on the way to the multiplier, for few rows: they wait for memory.

A word holds eight integers whose inputs lie 16 apart, so that a tile of 16 words by some outputs, shifted eight
times, is 128 inputs in order, and nothing is loaded twice. Few rows leave most of a GPU idle when every program runs
through all inputs, so programs share them and their sums are added up behind.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.triton_kernels.language import jit, next_power_of_2, reaches, tl

MAX_ROWS = 64
"""Of a product here; with more, unpacking once and cuBLAS is faster."""
TILE = 128
"""Inputs that one row of words holds: eight times 16."""
OUTPUTS = 64
"""Of one program."""
PROGRAMS = 528
"""Four for each multiprocessor of an H100."""


def pack_words(codes: Tensor) -> Tensor:
    """uint8 [N, K], K a multiple of 128 -> int32 [K / 8, N]: place j of word 16 t + i is input 128 t + 16 j + i."""
    places = codes.T.reshape(-1, 8, 16, codes.shape[0]).long()  # [tiles, shifts, words, N]
    shifts = torch.arange(0, 32, 4, device=codes.device)[None, :, None, None]
    words = (places << shifts).sum(1)
    return (words - ((words >> 31) << 32)).to(torch.int32).flatten(0, 1).contiguous()


def int4_matmul(x: Tensor, words: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """x: [T, K], rows contiguous; words: see `pack_words`; zeros: uint8 [G, N], scales: [G, N] -> float32 [T, N]."""
    if not reaches(x):
        return x.float() @ dequantise_plain(words, zeros, scales, x.dtype).float()
    num_rows, num_inputs, num_outputs = x.shape[0], x.shape[1], words.shape[1]
    columns = -(-num_outputs // OUTPUTS)
    rows = max(16, min(MAX_ROWS, next_power_of_2(num_rows)))
    row_tiles = -(-num_rows // rows)
    tiles = num_inputs // TILE
    per_program = -(-tiles // max(1, min(tiles, PROGRAMS // max(1, columns * row_tiles))))
    shares = -(-tiles // per_program)
    sums = x.new_empty(shares, num_rows, num_outputs, dtype=torch.float32)
    if sums.numel():
        _matmul_kernel[columns, shares, row_tiles](
            x, words, zeros, scales, sums, num_rows, num_outputs, tiles, per_program, x.stride(0),
            GROUP=num_inputs // scales.shape[0], ROWS=rows, OUTPUTS=OUTPUTS, num_warps=4, num_stages=3,
        )  # fmt: skip
    return sums[0] if shares == 1 else sums.sum(0)


def dequantise(words: Tensor, zeros: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that they stand for. -> [K, N]."""
    if not reaches(words):
        return dequantise_plain(words, zeros, scales, dtype)
    num_words, num_outputs = words.shape
    weight = torch.empty(8 * num_words, num_outputs, dtype=dtype, device=words.device)
    _dequantise_kernel[num_words // 16, -(-num_outputs // OUTPUTS)](
        words, zeros, scales, weight, num_outputs, GROUP=8 * num_words // scales.shape[0], OUTPUTS=OUTPUTS
    )
    return weight


def dequantise_plain(words: Tensor, zeros: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in plain torch."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)[None, :, None, None]
    tiles = words.view(-1, 1, 16, words.shape[1]) >> shifts & 15  # [tiles, shifts, words, N]
    grouped = tiles.reshape(scales.shape[0], -1, words.shape[1])
    return ((grouped - zeros[:, None].int()).float() * scales[:, None].float()).flatten(0, 1).to(dtype)


@jit
def _matmul_kernel(
    x, words, zeros, scales, sums,
    num_rows, num_outputs, tiles, per_program, stride_x,
    GROUP: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    share = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    here = output < num_outputs
    lane = tl.arange(0, 16)[:, None]
    place = tl.arange(0, 8)[:, None, None]
    source = x + row[:, None].to(tl.int64) * stride_x + tl.arange(0, 128)[None, :]
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for tile in range(share * per_program, tl.minimum(share * per_program + per_program, tiles)):
        packed = tl.load(
            words + (tile * 16 + lane).to(tl.int64) * num_outputs + output[None, :], mask=here[None, :], other=0
        )
        codes = (packed[None, :, :] >> (4 * place)) & 15
        if GROUP % 128 == 0:
            group = tile * 128 // GROUP * num_outputs + output[None, None, :]
        else:
            group = (tile * 128 + place * 16) // GROUP * num_outputs + output[None, None, :]
        zero = tl.load(zeros + group, mask=here[None, None, :], other=0).to(tl.int32)
        scale = tl.load(scales + group, mask=here[None, None, :], other=0.0).to(tl.float32)
        weight = ((codes - zero).to(tl.float32) * scale).to(x.dtype.element_ty)
        value = tl.load(source + tile * 128, mask=(row < num_rows)[:, None], other=0.0)
        total = tl.dot(value, tl.reshape(weight, [128, OUTPUTS]), total)
    target = sums + (share.to(tl.int64) * num_rows + row[:, None]) * num_outputs + output[None, :]
    tl.store(target, total, mask=(row < num_rows)[:, None] & here[None, :])


@jit
def _dequantise_kernel(words, zeros, scales, weight, num_outputs, GROUP: tl.constexpr, OUTPUTS: tl.constexpr):
    tile = tl.program_id(0)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    lane = tl.arange(0, 16)[:, None]
    here = output < num_outputs
    packed = tl.load(
        words + (tile * 16 + lane).to(tl.int64) * num_outputs + output[None, :], mask=here[None, :], other=0
    )
    for place in tl.static_range(8):
        start = tile * 128 + place * 16
        group = start // GROUP * num_outputs + output
        zero = tl.load(zeros + group, mask=here, other=0).to(tl.int32)
        scale = tl.load(scales + group, mask=here, other=0.0).to(tl.float32)
        value = (((packed >> (4 * place)) & 15) - zero[None, :]).to(tl.float32) * scale[None, :]
        target = weight + (start + lane).to(tl.int64) * num_outputs + output[None, :]
        tl.store(target, value.to(weight.dtype.element_ty), mask=here[None, :])
