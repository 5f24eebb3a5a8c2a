"""engine/noise.py's Gumbel noise inside kernels: the same hash, bit for bit, in float64 until the last rounding."""

from __future__ import annotations

from model.triton_kernels.language import constexpr, jit, tl

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
"""SplitMix64's constants."""

_GOLDEN = constexpr(GOLDEN)
_MIX_1 = constexpr(MIX_1)
_MIX_2 = constexpr(MIX_2)


@jit
def stream_of(seed, step):
    """What the noise of one token of one answer begins with. seed, step: int64 -> uint64."""
    return _mix(seed.to(tl.uint64) + _mix(step.to(tl.uint64) + _GOLDEN))


@jit
def gumbel(stream, token_ids):
    """stream: uint64, token_ids: int32 -> float32, standard Gumbel noise."""
    bits = _mix(stream + (token_ids + 1).to(tl.uint64) * _GOLDEN)
    uniform = ((bits >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16  # 2^-52
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@jit
def _mix(x):
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return x ^ (x >> 31)
