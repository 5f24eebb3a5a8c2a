"""The audio tower: Whisper's encoder over packed clips of true length, then pooling to 25 tokens a second.

Clips are laid end to end, each in a slot of 2 C + 2 mel frames that begins with one frame of zeros:

    mel      | 0  m0  m1 ... m(2C) | 0  m0 ...      slot of 2 C + 2 frames, K = 2 C + 1 of them real
    conv1    | 0  a0  a1 ... a(2C) | 0  a0 ...      the frame of zeros is put back after the activation
    conv2    |  b0   b1 ... b(C-1) * |  b0 ...      stride 2; * mixes two clips and is dropped

So one convolution over the whole pack gives each clip what it would get alone, zero padding at its left edge
included, and no clip sees another. At 30 s there is no frame m(2C): the slot keeps the zero that the reference's
own padding has there. Attention runs within each clip; a padded 30 s path is kept as the oracle for tests.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention.base import AttentionBackend, EncoderMetadata
from model.clip_pack import PackedClips
from model.config import AudioConfig, num_conv_frames, num_mel_frames
from model.layers import Embedding
from model.linear import Linear
from model.log_mel import log_mel, log_mel_padded


class AudioEncoder(nn.Module):
    """Two convolutions, learned-free sinusoidal positions (stored), pre-norm transformer, pool, norm."""

    def __init__(self, config: AudioConfig, backend: AttentionBackend) -> None:
        super().__init__()
        self.num_mel_bins = config.num_mel_bins
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.d_model, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.d_model, config.d_model, kernel_size=3, stride=2)
        self.embed_positions = Embedding(config.max_source_positions, config.d_model)
        blocks = [EncoderLayer(config, backend) for _ in range(config.encoder_layers)]
        self.layers: Iterable[EncoderLayer] = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.layer_norm = nn.LayerNorm(config.d_model)

    def mel(self, pack: PackedClips) -> Tensor:
        """What the convolutions see. -> [num_mel_bins, S], in the weights' precision."""
        num_clips = len(pack.metadata.lens)
        mel = log_mel(pack.signal, pack.frame_of_column, pack.clip_of_column, num_clips, self.num_mel_bins)
        return mel.masked_fill_(pack.is_blank.bool(), 0.0).to(self.conv1.weight.dtype)

    def forward(self, mel: Tensor, pack: PackedClips) -> Tensor:
        """mel: [num_mel_bins, S] -> hidden [A, C] of all clips in order."""
        hidden = self.frames(mel, pack)
        first, second = hidden.index_select(0, pack.pool_index), hidden.index_select(0, pack.pool_index + 1)
        return self.layer_norm((first + second) * 0.5)

    def frames(self, mel: Tensor, pack: PackedClips) -> Tensor:
        """Hidden states before pooling, 50 a second. mel: [num_mel_bins, S] -> [E, C]."""
        x = F.gelu(self.conv1(mel[None]))
        x = x.masked_fill(pack.is_blank.bool(), 0.0)  # not a product: a broken clip's NaN would survive it
        x = F.gelu(self.conv2(x))[0].T  # [S/2, C]: conv2 has no padding of its own, the slots bring it
        hidden = x.index_select(0, pack.frame_index) + self.embed_positions(pack.positions)
        for layer in self.layers:
            hidden = layer(hidden, pack.metadata)
        return hidden

    def forward_padded(self, clip: Tensor) -> Tensor:
        """The oracle: one clip in its 30 s window, keys past its end masked. clip: [S] -> [A, C]."""
        c = num_conv_frames(num_mel_frames(clip.shape[0]))
        mel = log_mel_padded(clip, self.num_mel_bins).to(self.conv1.weight.dtype)
        x = F.gelu(self.conv1(mel[None]))
        x = F.gelu(F.conv1d(x, self.conv2.weight, self.conv2.bias, stride=2, padding=1))[0].T
        hidden = x + self.embed_positions.weight
        mask = torch.arange(hidden.shape[0], device=clip.device) < c
        for layer in self.layers:
            hidden = layer.forward_masked(hidden, mask)
        return self.layer_norm(F.avg_pool1d(hidden.T[None], 2, stride=2)[0].T)[: c // 2]


class EncoderLayer(nn.Module):
    """Pre-norm block with exact (erf) GELU."""

    def __init__(self, config: AudioConfig, backend: AttentionBackend) -> None:
        super().__init__()
        self.backend = backend
        self.head_dim = config.head_dim
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.qkv_proj = Linear(config.d_model, 3 * config.d_model)
        self.out_proj = Linear(config.d_model, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = Linear(config.d_model, config.encoder_ffn_dim, gelu=True)
        self.fc2 = Linear(config.encoder_ffn_dim, config.d_model)

    def forward(self, hidden: Tensor, metadata: EncoderMetadata) -> Tensor:
        """hidden: [E, C] -> [E, C]."""
        query, key, value = self._heads(hidden)
        return self._feed_forward(self.out_proj(self.backend.encode(query, key, value, metadata).flatten(1), hidden))

    def forward_masked(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Dense attention over one window. hidden: [E, C], mask: bool [E], false where padding -> [E, C]."""
        query, key, value = (x.transpose(0, 1)[None] for x in self._heads(hidden))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[None, None, None])
        return self._feed_forward(self.out_proj(out[0].transpose(0, 1).flatten(1), hidden))

    def _heads(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> query, key, value, each [E, H, D]."""
        query, key, value = self.qkv_proj(self.self_attn_layer_norm(hidden)).chunk(3, dim=-1)
        shape = (-1, self.head_dim)
        return query.unflatten(-1, shape), key.unflatten(-1, shape), value.unflatten(-1, shape)

    def _feed_forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.fc1(self.final_layer_norm(hidden)), hidden)
