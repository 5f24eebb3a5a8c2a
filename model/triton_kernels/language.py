"""Triton where it is installed. Only here is it missed: without it kernels are defined, and never launched."""

from __future__ import annotations

import os

from torch import Tensor

__all__ = ["IS_INSTALLED", "IS_INTERPRETED", "constexpr", "jit", "jit_with", "next_power_of_2", "reaches", "tl"]

try:
    import triton
    import triton.language as tl

    jit = jit_with = triton.jit
    constexpr = tl.constexpr
    IS_INSTALLED = True
except ImportError:
    tl = None

    def jit(function=None, **_options):
        """The function as it is."""
        return function or (lambda function: function)

    def jit_with(**_options):
        """`jit`, once it is given a function."""
        return jit

    def constexpr(value):
        """The value as it is."""
        return value

    IS_INSTALLED = False

IS_INTERPRETED = IS_INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run as Python does, on tensors of a CPU too. Decided when Triton is imported."""


def reaches(tensor: Tensor) -> bool:
    """Whether a kernel can run on a tensor."""
    return IS_INTERPRETED or (IS_INSTALLED and tensor.is_cuda)


def next_power_of_2(number: int) -> int:
    """At least 1."""
    return 1 << max(0, number - 1).bit_length()
