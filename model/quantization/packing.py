"""Small integers in words of 32 bits, as AWQ and GPTQ lay them, and the weights that they stand for.

A weight is scale * (integer - zero point), scale and zero point shared by a group of inputs of one output. GPTQ
packs along the inputs, from the lowest bits on; AWQ along the outputs, eight to a word, in the order 0 2 4 6 1 3 5
7. Zero points are packed along the outputs by both, each in its own order.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """One module's quantised weight, unpacked. Raises ValueError when its parts do not go together."""

    bits: int
    codes: Tensor
    """uint8 [K, N]."""
    zeros: Tensor
    """uint8 [G, N]."""
    scales: Tensor
    """[G, N]."""
    groups: Tensor
    """int64 [K]: of each input its group."""

    def __post_init__(self) -> None:
        num_inputs, num_outputs = self.codes.shape
        num_groups = self.scales.shape[0]
        if not self.zeros.shape == self.scales.shape == (num_groups, num_outputs) or self.groups.shape != (
            num_inputs,
        ):
            raise ValueError(
                f"{list(self.codes.shape)} integers do not go with zero points {list(self.zeros.shape)}, scales "
                f"{list(self.scales.shape)} and groups {list(self.groups.shape)}"
            )
        if num_inputs and not 0 <= int(self.groups.min()) <= int(self.groups.max()) < num_groups:
            raise ValueError(f"inputs belong to groups beyond the {num_groups} that have scales")

    def dense(self) -> Tensor:
        """-> float32 [N, K]."""
        return (
            (self.codes.float() - self.zeros.float()[self.groups]) * self.scales.float()[self.groups]
        ).T.contiguous()

    def is_in_order(self) -> bool:
        """Whether groups follow each other and are equally large."""
        size = -(-self.codes.shape[0] // self.scales.shape[0])
        return torch.equal(self.groups, torch.arange(self.codes.shape[0]) // size)


def unpack_awq(scheme: QuantizationScheme, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> GroupedWeight:
    """qweight: int32 [K, N / 8], qzeros: int32 [G, N / 8], scales: [G, N]."""
    codes, zeros = unpack(qweight, scheme.bits, AWQ_PLACES), unpack(qzeros, scheme.bits, AWQ_PLACES)
    return GroupedWeight(scheme.bits, codes, zeros, scales, _groups(scheme, codes.shape[0]))


def unpack_gptq(
    scheme: QuantizationScheme, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None = None
) -> GroupedWeight:
    """qweight: int32 [K * bits / 32, N], qzeros: int32 [G, N * bits / 32], scales: [G, N], g_idx: the group of each
    input, [K], where act-order has mixed them.
    """
    codes = unpack(qweight.T.contiguous(), scheme.bits).T
    zeros = unpack(qzeros, scheme.bits) + scheme.zero_offset & (1 << scheme.bits) - 1
    groups = _groups(scheme, codes.shape[0]) if g_idx is None else g_idx.long()
    return GroupedWeight(scheme.bits, codes, zeros, scales, groups)


def _groups(scheme: QuantizationScheme, num_inputs: int) -> Tensor:
    """Of each input its group. -> [K]."""
    size = num_inputs if scheme.group_size == -1 else scheme.group_size
    return torch.arange(num_inputs) // size
