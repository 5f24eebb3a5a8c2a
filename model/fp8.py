"""Numbers of 8 bits with 4 of exponent and 3 of mantissa, `float8_e4m3fn`: up to 448, no infinity, and NaN."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
MAX = torch.finfo(DTYPE).max


def to_fp8(x: Tensor) -> Tensor:
    """Round to the nearest; saturate at 448 with every version of torch. NaN stays NaN."""
    return x.clamp(-MAX, MAX).to(DTYPE)


def movable(x: Tensor) -> Tensor:
    """The same memory as torch can gather and scatter it: for float8 there are no such operators."""
    return x.view(torch.uint8) if x.dtype == DTYPE else x
