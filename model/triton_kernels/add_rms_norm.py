"""A residual's addition and the RMSNorm that follows it, one row a program, in one pass over memory.

In torch they are nine: the sum, and eight operators of the norm. Roundings are those of `model.layers.RMSNorm` after
a sum: the sum in the precision of the activations, statistics in float32, the normalised row rounded, then times the
weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.triton_kernels.language import jit, next_power_of_2, tl

MAX_WARPS = 16
ELEMENTS_PER_WARP = 256
"""16 bytes a thread in bfloat16."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [T, C], rows contiguous, weight: [C] -> [T, C]."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x, None, weight, eps, out, None)
    return out


def add_rms_norm(x: Tensor, addend: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, addend: [T, C], rows contiguous, weight: [C] -> the sum normalised, and the sum, [T, C] each."""
    out, total = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    _launch(x, addend, weight, eps, out, total)
    return out, total


def _launch(x: Tensor, addend: Tensor | None, weight: Tensor, eps: float, out: Tensor, total: Tensor | None) -> None:
    num_rows, width = x.shape
    if num_rows == 0:
        return
    padded = next_power_of_2(width)
    _kernel[(num_rows,)](
        x, x if addend is None else addend, weight, out, out if total is None else total,
        x.stride(0), 0 if addend is None else addend.stride(0), width, eps,
        PADDED=padded, ADDS=addend is not None, num_warps=max(1, min(MAX_WARPS, padded // ELEMENTS_PER_WARP)),
    )  # fmt: skip


@jit
def _kernel(
    x, addend, weight, out, total, stride_x, stride_addend, width, eps, PADDED: tl.constexpr, ADDS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PADDED)
    inside = place < width
    dtype: tl.constexpr = out.dtype.element_ty
    value = tl.load(x + row * stride_x + place, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        value += tl.load(addend + row * stride_addend + place, mask=inside, other=0.0).to(tl.float32)
        value = value.to(dtype).to(tl.float32)
        tl.store(total + row * width + place, value.to(dtype), mask=inside)
    scale = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    normal = (value * scale).to(dtype).to(tl.float32)
    factor = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + place, (factor * normal).to(dtype), mask=inside)
