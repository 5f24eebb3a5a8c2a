"""silu(gate) * up in one pass: torch writes silu(gate) and reads it again.

silu is rounded to the precision of the activations before the product, as in `model.layers.SwiGlu`.
"""

from __future__ import annotations

from torch import Tensor

from model.triton_kernels.language import jit, tl

BLOCK = 1024


def swiglu(x: Tensor) -> Tensor:
    """x: [T, 2 C], the gates first, rows contiguous -> [T, C]."""
    num_rows, width = x.shape[0], x.shape[1] // 2
    out = x.new_empty(num_rows, width)
    if num_rows:
        _kernel[num_rows, -(-width // BLOCK)](x, out, x.stride(0), width, BLOCK=BLOCK)
    return out


@jit
def _kernel(x, out, stride_x, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    dtype: tl.constexpr = out.dtype.element_ty
    gate = tl.load(x + row * stride_x + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * stride_x + width + place, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + row * width + place, (silu * up).to(dtype), mask=inside)
