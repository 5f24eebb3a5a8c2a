"""The decoder: Qwen2 over packed tokens [T, C]. There is no batch dimension and no padding.

Read top-down: Qwen2Decoder -> DecoderLayer -> SelfAttention, Mlp. Weights that are read together are stored
together (`qkv_proj`, `gate_up_proj`); the loader knows how the published tensors fill them. With tensor parallelism
the config is that of this rank (`Shard.share`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from model.attention.base import AttentionBackend, AttentionMetadata
from model.config import TextConfig
from model.layers import RMSNorm, RotaryEmbedding, SwiGlu, VocabEmbedding
from model.linear import Linear, RowParallelLinear
from model.parallel import Shard


class OneToken(Protocol):
    """All layers and the final norm for a step of one token of each of a few sequences."""

    max_rows: int

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, metadata: AttentionMetadata) -> Tensor:
        """hidden: [T, C], T at most `max_rows`; cos, sin: [T, 1, D / 2]; kv: [L, 2, N, P, Hkv, D] -> [T, C]."""
        ...


class Qwen2Decoder(nn.Module):
    """Token embedding, the layers and the final norm."""

    def __init__(self, config: TextConfig, backend: AttentionBackend, shard: Shard) -> None:
        super().__init__()
        self.embed_tokens = VocabEmbedding(config.vocab_size, config.hidden_size, shard)
        blocks = [DecoderLayer(config, backend, shard) for _ in range(config.num_hidden_layers)]
        self.layers: Sequence[DecoderLayer] = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_theta)
        self.one_token: OneToken | None = None
        """Computes such steps, where there is such a thing."""

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        kv: Tensor,
        metadata: AttentionMetadata,
        rows: Tensor | None = None,
    ) -> Tensor:
        """hidden: [T, C], positions: int32 [T], kv: [L, 2, N, P, Hkv, D] -> [T, C]; of `rows`, int64 [R]: [R, C].

        Of the last layer, rows that nobody asks for need only their keys and values.
        """
        cos, sin = self.rotary.tables(positions, hidden.dtype)
        if (
            self.one_token
            and kv.dtype == hidden.dtype
            and len(hidden) == metadata.num_decodes <= self.one_token.max_rows
        ):
            hidden = self.one_token(hidden, cos, sin, kv, metadata)
            return hidden if rows is None else hidden[rows]
        addend = None
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            wanted = rows if index == last else None
            hidden, addend = layer(hidden, addend, cos, sin, kv[index], metadata, wanted)
        return self.norm.after_adding(hidden, addend)[0]


class DecoderLayer(nn.Module):
    """Pre-norm residual block.

    What a block adds to the residual travels beside it until the next norm, which adds and normalises in one pass
    where it can; where the product adds it (`Linear.forward_onto`), nothing travels.
    """

    def __init__(self, config: TextConfig, backend: AttentionBackend, shard: Shard) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, backend, shard)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(config, shard)

    def forward(
        self,
        hidden: Tensor,
        addend: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        kv_layer: Tensor,
        metadata: AttentionMetadata,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden: [T, C], addend: what is still to be added to it, if anything -> the same; of `rows`: [R, C]."""
        x, hidden = self.input_layernorm.after_adding(hidden, addend)
        hidden, addend = self.self_attn(x, hidden, cos, sin, kv_layer, metadata, rows)
        x, hidden = self.post_attention_layernorm.after_adding(hidden, addend)
        return self.mlp(x, hidden)


class SelfAttention(nn.Module):
    """Rotary grouped-query attention; biases on q, k, v and none on o."""

    def __init__(self, config: TextConfig, backend: AttentionBackend, shard: Shard) -> None:
        super().__init__()
        num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.num_kv_heads = num_kv_heads
        self.backend = backend
        self.kv_scales: Tensor | None = None
        """float32 [2, Hkv] where the cache is in float8: see model/kv_scales.py."""
        self.qkv_proj = Linear(config.hidden_size, (num_heads + 2 * num_kv_heads) * self.head_dim)
        self.o_proj = RowParallelLinear(num_heads * self.head_dim, config.hidden_size, shard)

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        cos: Tensor,
        sin: Tensor,
        kv_layer: Tensor,
        metadata: AttentionMetadata,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """x, residual: [T, C] -> the residual, and what is still to be added to it; of `rows`, int64 [R]: [R, C]."""
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))  # [T, H + 2 Hkv, D]
        out = self.backend.decode(heads, cos, sin, kv_layer, metadata, self.kv_scales)
        if rows is not None:
            out, residual = out[rows], residual[rows]
        return self.o_proj.forward_onto(out.flatten(1), residual)


class Mlp(nn.Module):
    """The gated feed-forward block."""

    def __init__(self, config: TextConfig, shard: Shard) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.activation = SwiGlu()
        self.down_proj = RowParallelLinear(config.intermediate_size, config.hidden_size, shard)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """x, residual: [T, C] -> the residual, and what is still to be added to it."""
        return self.down_proj.forward_onto(self.activation(self.gate_up_proj(x)), residual)
