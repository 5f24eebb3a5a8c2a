"""Small integers in words of 32 bits, as AWQ and GPTQ lay them, and the weights that they stand for.

A weight is scale * (integer - zero point), scale and zero point shared by a group of inputs of one output. GPTQ
packs along the inputs, from the lowest bits on; AWQ along the outputs, eight to a word, in the order 0 2 4 6 1 3 5
7. Zero points are packed along the outputs by both, each in its own order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.quantization.scheme import QuantizationScheme

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word each of eight outputs lies, counted from the lowest bits."""


def unpack(packed: Tensor, bits: int, places: tuple[int, ...] | None = None) -> Tensor:
    """int32 [R, W] -> uint8 [R, W * 32 / bits]. `places`: where in a word each integer lies; None: in order."""
    order = torch.arange(32 // bits) if places is None else torch.tensor(places)
    words = packed[..., None] >> (order * bits).to(packed.device, torch.int32)
    return (words & (1 << bits) - 1).to(torch.uint8).flatten(1)


def dequantise_awq(scheme: QuantizationScheme, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """qweight: int32 [K, N / 8], qzeros: int32 [G, N / 8], scales: [G, N] -> float32 [N, K].

    Raises ValueError when the shapes do not fit.
    """
    codes, zeros = unpack(qweight, scheme.bits, AWQ_PLACES), unpack(qzeros, scheme.bits, AWQ_PLACES)
    return _dequantise(codes, zeros, scales, _groups(scheme, codes.shape[0]))


def dequantise_gptq(
    scheme: QuantizationScheme, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None = None
) -> Tensor:
    """qweight: int32 [K * bits / 32, N], qzeros: int32 [G, N * bits / 32], scales: [G, N], g_idx: the group of each
    input, [K], where act-order has mixed them -> float32 [N, K]. Raises ValueError when the shapes do not fit.
    """
    codes = unpack(qweight.T.contiguous(), scheme.bits).T
    zeros = unpack(qzeros, scheme.bits) + scheme.zero_offset & (1 << scheme.bits) - 1
    return _dequantise(codes, zeros, scales, _groups(scheme, codes.shape[0]) if g_idx is None else g_idx.long())


def _groups(scheme: QuantizationScheme, num_inputs: int) -> Tensor:
    """Of each input its group. -> [K]."""
    size = num_inputs if scheme.group_size == -1 else scheme.group_size
    return torch.arange(num_inputs) // size


def _dequantise(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    """codes: uint8 [K, N], zeros and scales: [G, N], groups: [K] -> float32 [N, K]."""
    num_inputs, num_outputs = codes.shape
    if not zeros.shape == scales.shape == (scales.shape[0], num_outputs) or groups.shape != (num_inputs,):
        raise ValueError(
            f"{list(codes.shape)} integers do not go with zero points {list(zeros.shape)}, scales "
            f"{list(scales.shape)} and groups {list(groups.shape)}"
        )
    if num_inputs and not 0 <= int(groups.min()) <= int(groups.max()) < scales.shape[0]:
        raise ValueError(f"inputs belong to groups beyond the {scales.shape[0]} that have scales")
    return ((codes.float() - zeros.float()[groups]) * scales.float()[groups]).T.contiguous()
