"""The checkpoint's architecture for training: equal-length rows, plain batches, the published tensor names.

The same mathematics as `model/`, which packs clips of any length and needs a paged cache; here every clip of
a batch has the same number of frames, so that no mask is needed anywhere. A state dict of `Network` without
its CTC head, under the names below, is the published layout.

Dimensions: B rows, S tokens, F mel frames, E encoder frames, A audio tokens, C width, H heads, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Places = tuple[Tensor, Tensor]  # rows and columns of a [B, S] batch


@dataclass(frozen=True)
class NetworkSizes:
    """The sizes of both towers; every head is 64 wide."""

    num_mel_bins: int = 128
    encoder_width: int = 192
    encoder_layers: int = 4
    encoder_ffn: int = 768
    max_positions: int = 1500
    width: int = 256
    layers: int = 5
    ffn: int = 640
    kv_heads: int = 2
    vocab_size: int = 1536
    ctc_classes: int = 28
    head_dim: int = 64


def sinusoids(length: int, width: int) -> Tensor:
    """Whisper's position table: [length, width], sines then cosines."""
    step = math.log(10_000) / (width // 2 - 1)
    angles = torch.arange(length)[:, None] * torch.exp(-step * torch.arange(width // 2))[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class EncoderAttention(nn.Module):
    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.heads = width // head_dim
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, E, D]
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    def __init__(self, sizes: NetworkSizes) -> None:
        super().__init__()
        width = sizes.encoder_width
        self.self_attn = EncoderAttention(width, sizes.head_dim)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, sizes.encoder_ffn)
        self.fc2 = nn.Linear(sizes.encoder_ffn, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, drop: float) -> Tensor:
        x = x + F.dropout(self.self_attn(self.self_attn_layer_norm(x)), drop, self.training)
        return x + F.dropout(self.fc2(F.gelu(self.fc1(self.final_layer_norm(x)))), drop, self.training)


class AudioTower(nn.Module):
    """Log-mel [B, 128, F] -> (frames before pooling [B, E, C], pooled and normalised [B, A, C])."""

    def __init__(self, sizes: NetworkSizes) -> None:
        super().__init__()
        width = sizes.encoder_width
        self.conv1 = nn.Conv1d(sizes.num_mel_bins, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(sizes.max_positions, width)
        self.embed_positions.weight = nn.Parameter(sinusoids(sizes.max_positions, width), requires_grad=False)
        self.layers = nn.ModuleList(EncoderLayer(sizes) for _ in range(sizes.encoder_layers))
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, mel: Tensor, num_frames: int, drop: float = 0.0) -> tuple[Tensor, Tensor]:
        num_conv = -(-num_frames // 2)
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).transpose(1, 2)[:, :num_conv]  # [B, E, C]
        x = x + self.embed_positions.weight[:num_conv]
        for layer in self.layers:
            x = layer(x, drop)
        pooled = F.avg_pool1d(x.transpose(1, 2), 2, 2).transpose(1, 2)
        return x, self.layer_norm(pooled)


class DecoderAttention(nn.Module):
    def __init__(self, sizes: NetworkSizes) -> None:
        super().__init__()
        kv_width = sizes.kv_heads * sizes.head_dim
        self.head_dim = sizes.head_dim
        self.q_proj = nn.Linear(sizes.width, sizes.width)
        self.k_proj = nn.Linear(sizes.width, kv_width)
        self.v_proj = nn.Linear(sizes.width, kv_width)
        self.o_proj = nn.Linear(sizes.width, sizes.width, bias=False)

    def mix(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """What the heads gather, [B, S, H * D]; `o_proj` is still to come."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on [B, H, S, D]; dimensions i and i + D/2 are a pair."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, sizes: NetworkSizes) -> None:
        super().__init__()
        self.self_attn = DecoderAttention(sizes)
        self.mlp = FeedForward(sizes.width, sizes.ffn)
        self.input_layernorm = nn.RMSNorm(sizes.width, eps=1e-5)
        self.post_attention_layernorm = nn.RMSNorm(sizes.width, eps=1e-5)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, drop: float, only: Places | None = None) -> Tensor:
        """[B, S, C] -> [B, S, C], or [N, C] where `only` names the places whose result is wanted."""
        mixed = self.self_attn.mix(self.input_layernorm(x), cos, sin)
        if only is not None:
            x, mixed = x[only], mixed[only]
        x = x + F.dropout(self.self_attn.o_proj(mixed), drop, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), drop, self.training)


class Decoder(nn.Module):
    """Token embeddings [B, S, C] -> normalised states of the places asked for [N, C]."""

    def __init__(self, sizes: NetworkSizes) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(sizes.vocab_size, sizes.width)
        self.layers = nn.ModuleList(DecoderLayer(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.width, eps=1e-5)
        self.head_dim = sizes.head_dim

    def forward(self, x: Tensor, places: Places, drop: float = 0.0) -> Tensor:
        frequencies = 10_000.0 ** (-torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        angles = torch.arange(x.shape[1]).float()[:, None] * frequencies[None]
        cos, sin = (torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin))
        for layer in self.layers[:-1]:
            x = layer(x, cos, sin, drop)
        return self.norm(self.layers[-1](x, cos, sin, drop, places))


class LanguageModel(nn.Module):
    def __init__(self, sizes: NetworkSizes) -> None:
        super().__init__()
        self.model = Decoder(sizes)
        self.lm_head = nn.Linear(sizes.width, sizes.vocab_size, bias=False)


class Projector(nn.Module):
    def __init__(self, sizes: NetworkSizes) -> None:
        super().__init__()
        self.linear = nn.Linear(sizes.encoder_width, sizes.width)


class Network(nn.Module):
    """Both towers, the projector, and a character CTC head that only training uses."""

    def __init__(self, sizes: NetworkSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.audio_tower = AudioTower(sizes)
        self.multi_modal_projector = Projector(sizes)
        self.language_model = LanguageModel(sizes)
        self.ctc_head = nn.Linear(sizes.encoder_width, sizes.ctc_classes)
        self.ctc_norm = nn.LayerNorm(sizes.encoder_width)
        with torch.no_grad():  # else the sound is a tenth of the position table, and listening starts late
            self.audio_tower.conv1.weight *= 2
            self.audio_tower.conv2.weight *= 3
        nn.init.normal_(self.language_model.model.embed_tokens.weight, std=0.05)
        nn.init.normal_(self.language_model.lm_head.weight, std=0.02)

    def ctc_log_probs(self, frames: Tensor) -> Tensor:
        """Encoder frames [B, E, C] -> character log probabilities [E, B, classes]."""
        return self.ctc_head(self.ctc_norm(frames)).transpose(0, 1).log_softmax(-1)

    def embed(self, token_ids: Tensor, is_audio: Tensor, audio: Tensor) -> Tensor:
        """Embed [B, S] ids; where `is_audio`, put the rows of `audio` [N, C], which are in that order."""
        x = self.language_model.model.embed_tokens(token_ids)
        return x.masked_scatter(is_audio[..., None], audio)

    def logits(self, states: Tensor) -> Tensor:
        return self.language_model.lm_head(states)
