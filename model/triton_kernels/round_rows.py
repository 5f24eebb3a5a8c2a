"""Rows of activations rounded to float8 in one pass: in torch it is a maximum, a division, a clamp and a cast.

A row with something in it that is not a finite number gets a scale that is not one either, and so a product that is
not a number: a broken request stays one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model import fp8
from model.triton_kernels.language import jit, next_power_of_2, reaches, tl

MAX_BLOCK = 8192
"""Of a row, held in registers at once; longer rows are read twice."""
SMALLEST_SCALE = 1e-12
"""Of a row of zeros."""


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [T, K], rows contiguous -> float8 [T, K] and the scales by which x was divided, float32 [T, 1]."""
    if not reaches(x):
        return round_rows_plain(x)
    num_rows, width = x.shape
    codes, scales = x.new_empty(num_rows, width, dtype=fp8.DTYPE), x.new_empty(num_rows, 1, dtype=torch.float32)
    if num_rows:
        block = min(next_power_of_2(width), MAX_BLOCK)
        _kernel[(num_rows,)](x, codes, scales, x.stride(0), width, BLOCK=block, num_warps=8 if block > 2048 else 4)
    return codes, scales


def round_rows_plain(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    wide = x.float()
    largest = wide.abs().amax(1, keepdim=True)
    scales = torch.where(largest.isfinite(), (largest / fp8.MAX).clamp(min=SMALLEST_SCALE), float("nan"))
    return fp8.to_fp8(wide / scales), scales


@jit
def _kernel(x, codes, scales, stride_x, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BLOCK], tl.float32)
    broken = tl.zeros([BLOCK], tl.int32)
    for start in range(0, width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * stride_x + place, mask=place < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
        broken += tl.where(tl.abs(value) < float("inf"), 0, 1)
    scale = tl.maximum(tl.div_rn(tl.max(largest, 0), 448.0), 1e-12)
    scale = tl.where(tl.max(broken, 0) > 0, float("nan"), scale)
    tl.store(scales + row, scale)
    for start in range(0, width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * stride_x + place, mask=place < width, other=0.0).to(tl.float32)
        value = tl.div_rn(value, scale)
        value = tl.where(value > 448.0, 448.0, tl.where(value < -448.0, -448.0, value))
        tl.store(codes + row * width + place, value.to(codes.dtype.element_ty), mask=place < width)
