"""The decoder's small layers: RMSNorm, SwiGLU and rotary position embedding.

Dimension key of this package: T packed tokens, B sequences, C hidden, H heads, D head dim, L layers, N blocks,
P block size, M blocks per sequence, F mel frames, E encoder frames, A audio tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.parallel import Shard


class RMSNorm(nn.Module):
    """Root-mean-square norm: statistics in float32, cast back, then times the weight (Qwen2RMSNorm's order)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.kernel: Callable[[Tensor, Tensor, float], Tensor] | None = None
        """Computes the same in one pass, where there is one."""
        self.add_kernel: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] | None = None
        """`after_adding` in one pass, where there is one."""

    def after_adding(self, x: Tensor, addend: Tensor | None) -> tuple[Tensor, Tensor]:
        """x: [T, C], addend: [T, C] or nothing -> the sum normalised, and the sum, [T, C] each."""
        if addend is None:
            return self(x), x
        if self.add_kernel is not None:
            return self.add_kernel(x, addend, self.weight, self.eps)
        total = x + addend
        return self(total), total

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, C] -> [T, C]."""
        if self.kernel is not None:
            return self.kernel(x, self.weight, self.eps)
        if x.dtype == torch.float32:
            return torch.rms_norm(x, self.weight.shape, self.weight, self.eps)
        x32 = x.float()
        scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (x32 * scale).to(x.dtype)


class SwiGlu(nn.Module):
    """silu(gate) * up."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel: Callable[[Tensor], Tensor] | None = None
        """Computes the same in one pass, where there is one."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, 2 C], the gates first -> [T, C]."""
        if self.kernel is not None:
            return self.kernel(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up


class Embedding(nn.Embedding):
    """Rows to look up, empty until a checkpoint fills them."""

    def reset_parameters(self) -> None:
        """Leave them: random numbers for tensors without memory are torch's compiler's, a second of imports."""


class VocabEmbedding(Embedding):
    """Token embeddings, of which each rank has a run of the vocabulary."""

    def __init__(self, vocab_size: int, width: int, shard: Shard) -> None:
        super().__init__(shard.part(vocab_size), width)
        self.shard = shard

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: int32 [T] -> [T, C], on every rank."""
        if self.shard.size == 1:
            return super().forward(token_ids)
        rows = token_ids - self.shard.rank * self.num_embeddings
        elsewhere = (rows < 0) | (rows >= self.num_embeddings)
        hidden = super().forward(rows.masked_fill(elsewhere, 0)).masked_fill_(elsewhere[:, None], 0.0)
        return self.shard.all_reduce(hidden)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding, half-split form: dims i and i + D/2 turn together."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        self._inv_freq = 1.0 / theta**exponent  # no buffer: it is never stored, nor cast with the weights

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Angles once per step for all layers. positions: int32 [T] -> cos, sin: [T, 1, D/2].

        Computed in float32 and then cast, as in the reference.
        """
        if self._inv_freq.device != positions.device:
            self._inv_freq = self._inv_freq.to(positions.device)
        angle = positions[:, None].float() * self._inv_freq
        return angle.cos().to(dtype)[:, None], angle.sin().to(dtype)[:, None]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [T, H, D], cos and sin: [T, 1, D/2] -> [T, H, D]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
