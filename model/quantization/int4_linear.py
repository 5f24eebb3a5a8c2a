"""Products with weights of four bits that stay packed: few rows unpack them on the way, many unpack them once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.quantization.packing import GroupedWeight
from model.triton_kernels.int4_matmul import MAX_ROWS, TILE, dequantise, int4_matmul, pack_words


class Int4Weight:
    """x W^T + b from a weight in four bits."""

    def __init__(self, parts: Sequence[GroupedWeight], device: torch.device) -> None:
        """Parts that `fits` holds of, whose outputs follow each other."""
        self._words = torch.cat([pack_words(part.codes.T) for part in parts], dim=1).to(device)
        self._zeros = torch.cat([part.zeros for part in parts], dim=1).to(device)
        self._scales = torch.cat([part.scales for part in parts], dim=1).to(device)

    @staticmethod
    def fits(parts: Sequence[GroupedWeight]) -> bool:
        """Whether the kernels take them: whole tiles of inputs, and groups in order, as many in each part."""
        num_inputs, num_groups = parts[0].codes.shape[0], parts[0].scales.shape[0]
        return (
            num_inputs % TILE == 0
            and num_inputs % (16 * num_groups) == 0
            and all(part.bits == 4 and part.scales.shape[0] == num_groups and part.is_in_order() for part in parts)
        )

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x: [T, K], bias: [N] or None -> [T, N]."""
        if x.shape[0] > MAX_ROWS:
            weight = dequantise(self._words, self._zeros, self._scales, x.dtype)
            return x @ weight if bias is None else torch.addmm(bias, x, weight)
        sums = int4_matmul(x, self._words, self._zeros, self._scales)
        return (sums if bias is None else sums + bias).to(x.dtype)

    def dense(self) -> Tensor:
        """What the weight stands for. -> float32 [N, K]."""
        return dequantise(self._words, self._zeros, self._scales, torch.float32).T
