"""Products in float8: weights with a scale for each output, activations rounded row by row as they come.

cuBLAS and CUTLASS multiply both (`torch._scaled_mm`, scales by row and by column) and sum in float32: Hopper's
faster way to sum keeps fewer bits than thousands of products need. The encoder and its projector are left alone, as
are embeddings, norms and the lm_head: a tenth of the weights that a step reads, and its errors are in every choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.errors import ConfigError
from model.linear import Linear
from model.qwen2 import Qwen2Decoder
from model.triton_kernels.round_rows import round_rows, round_rows_plain


class Fp8Weight:
    """x W^T + b from a weight in float8."""

    def __init__(self, weight: Tensor) -> None:
        """weight: [N, K], both multiples of 16. Raises ConfigError when they are not."""
        if weight.shape[0] % 16 or weight.shape[1] % 16:
            raise ConfigError(f"--quantization fp8 takes multiples of 16; a layer has {list(weight.shape)}")
        self.codes, scales = round_rows_plain(weight)
        self.scales = scales.T.contiguous()
        """float32 [1, N]."""

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x: [T, K], bias: [N] or None -> [T, N]."""
        if x.shape[0] == 0:
            return x.new_empty(0, self.codes.shape[0])
        codes, scales = round_rows(x)
        return torch._scaled_mm(codes, self.codes.T, scales, self.scales, bias, out_dtype=x.dtype)

    def dense(self) -> Tensor:
        """What the weight stands for. -> float32 [N, K]."""
        return self.codes.float() * self.scales.T


def round_to_fp8(decoder: Qwen2Decoder) -> None:
    """Turn the layers' weights into float8 in place, one after the other. Raises ConfigError for odd shapes."""
    for module in decoder.modules():
        if isinstance(module, Linear):
            module.replace_weight(Fp8Weight(module.weight))
