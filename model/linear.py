"""Linear layers, and the form their weights take on a CPU.

As loaded, a layer is torch's own. `pack` turns it, on a CPU, into oneDNN's blocked layout, once: torch's plain
`linear` reorders the weights in every call, which at one row costs more than the product. What follows a product
(GELU, the residual) is then applied to its float32 sums before they are rounded. The operators are those that
torch's own compiler emits for a CPU (`torch/_inductor/mkldnn_ir.py`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """x W^T + b, through an exact GELU where the layer has one, plus a residual where the caller brings one."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, gelu: bool = False) -> None:
        super().__init__(in_features, out_features, bias)
        self.gelu = gelu
        self._packed: Tensor | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [T, K], residual: [T, N] or None -> [T, N]."""
        assert residual is None or not self.gelu, "nothing needs both"
        if self._packed is not None:
            return self._forward_packed(x, residual)
        out = F.linear(x, self.weight, self.bias)
        if self.gelu:
            out = F.gelu(out)
        return out if residual is None else residual + out

    def pack(self) -> None:
        """Take the blocked layout and let go of the weights as loaded. float32 or bfloat16, on a CPU."""
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight)
        del self.weight

    def _forward_packed(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if residual is not None:
            return torch.ops.mkldnn._linear_pointwise(x, residual, self._packed, self.bias, "add")
        return torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self.bias, "gelu" if self.gelu else "none", [], "none"
        )


def pack_linears(model: nn.Module) -> None:
    """Pack every linear layer of a model that has been loaded onto a CPU."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.pack()
