"""Noise that depends on (seed, step, token id) and on nothing else.

Each uniform is a hash of those three numbers (SplitMix64's finaliser, Steele et al. 2014). So a request's noise
does not change with its batch, its row, the device or the number of candidates looked at, and no generator state
has to be kept, moved or restored after a preemption.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.triton_kernels.noise import GOLDEN, MIX_1, MIX_2


def gumbel(seeds: Tensor, steps: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise. seeds, steps: int64 [R]; token_ids: int64 [R, K] or [1, K] -> float32 [R, K].

    The argmax of log-probabilities plus this noise is a sample from them.
    """
    stream = _mix(seeds + _mix(steps + _signed(GOLDEN)))
    bits = _mix(stream[:, None] + (token_ids + 1) * _signed(GOLDEN))
    uniform = (_shift(bits, 12).double() + 0.5) * 2.0**-52  # in (0, 1): with a bit more, the last would round to 1
    return uniform.log_().neg_().log_().neg_().float()


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, whose products wrap."""
    x = (x ^ _shift(x, 30)) * _signed(MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(MIX_2)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, count: int) -> Tensor:
    """Logical right shift: torch's is arithmetic."""
    return torch.bitwise_and(x >> count, (1 << (64 - count)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant
