"""Linear layers, and the forms their weights take on a CPU.

As loaded, a layer is torch's own. `pack` turns it, on a CPU, into oneDNN's blocked layout, once: torch's plain
`linear` reorders the weights in every call, which at one row costs more than the product. What follows a product
(GELU, the residual) is then applied to its float32 sums before they are rounded. The operators are those that
torch's own compiler emits for a CPU (torch/_inductor/mkldnn_ir.py).

`replace_weight` gives a layer another product altogether (`model/quantization`).

With int8, products of few rows read weights of 8 bits (symmetric, one scale for each output): they wait for memory,
and it is half as much. Products of more rows wait for arithmetic, which int8 weights do not help: they multiply the
same rounded weights in the layer's own precision.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.gemv_cpu import packed_blocks
from model.parallel import Shard

MAX_INT8_ROWS = 4
"""Of a product: with more, reading 8 bits a weight saves less than unpacking them costs (docs/decisions.md)."""


class Product(Protocol):
    """A weight in a form of its own, and products with it."""

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x: [T, K], bias: [N] or None -> x W^T + b, [T, N]."""
        ...

    def dense(self) -> Tensor:
        """What the weight stands for. -> float32 [N, K]."""
        ...


class Linear(nn.Linear):
    """x W^T + b, through an exact GELU where the layer has one, plus a residual where the caller brings one."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, gelu: bool = False) -> None:
        super().__init__(in_features, out_features, bias)
        self.gelu = gelu
        self._packed: Tensor | None = None
        self.blocks: int | None = None
        """Where the packed weight lies, if it is all that the product takes and `gemv_cpu` can read it."""
        self._int8: tuple[Tensor, Tensor] | None = None
        """int8 [N, K], and the scale of each output, [N]."""
        self._product: Product | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [T, K], residual: [T, N] or None -> [T, N]."""
        assert residual is None or not self.gelu, "nothing needs both"
        if self._packed is not None:
            return self._forward_packed(x, residual)
        out = self._product(x, self.bias) if self._product else F.linear(x, self.weight, self.bias)
        if self.gelu:
            out = F.gelu(out)
        return out if residual is None else residual + out

    def forward_onto(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """A residual and what is still to be added to it: nothing where the product itself adds to it at no cost.

        x: [T, K], residual: [T, N] -> [T, N] and [T, N] or None, for `RMSNorm.after_adding`.
        """
        return (residual, self(x)) if self._packed is None else (self(x, residual), None)

    def replace_weight(self, product: Product) -> None:
        """Compute x W^T + b by `product` and let go of the weight as loaded."""
        self._product = product
        del self.weight

    def dense_weight(self) -> Tensor:
        """[N, K], of a layer that has not been packed."""
        return self._product.dense() if self._product else self.weight

    def pack(self, *, int8: bool = False) -> None:
        """Take the blocked layout and let go of the weights as loaded. float32 or bfloat16, on a CPU."""
        weight: Tensor = self.weight
        if int8:
            scales = (weight.float().abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-12).to(weight.dtype)
            rounded = (weight.float() / scales.float()).round().clamp(-127, 127)
            self._int8 = rounded.to(torch.int8), scales[:, 0]
            weight = (rounded * scales.float()).to(weight.dtype)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.blocks = None if int8 else packed_blocks(self._packed, weight)
        del self.weight

    def _forward_packed(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self._int8 is not None and x.shape[0] <= MAX_INT8_ROWS:
            out = torch._weight_int8pack_mm(x.contiguous(), *self._int8)
            out = out if self.bias is None else out + self.bias
            out = F.gelu(out) if self.gelu else out
            return out if residual is None else residual + out
        if residual is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._packed, self.bias, "add")
        return torch.ops.mkldnn._linear_pointwise.default(
            x, self._packed, self.bias, "gelu" if self.gelu else "none", [], "none"
        )


class RowParallelLinear(Linear):
    """x W^T plus a residual, of which each rank has some columns of x and of W. Every rank gets the sum."""

    def __init__(self, in_features: int, out_features: int, shard: Shard) -> None:
        """in_features: of this rank."""
        super().__init__(in_features, out_features, bias=False)
        self.shard = shard

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [T, K], this rank's columns; residual: [T, N] or None -> [T, N]. The residual is added once."""
        return self.shard.all_reduce(super().forward(x, residual if self.shard.rank == 0 else None))
