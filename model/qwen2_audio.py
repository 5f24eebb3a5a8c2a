"""Qwen2-Audio: the audio tower, the projector and the decoder. The only file that knows both towers.

A step of the engine is: `encode_audio` for clips that are new, `embed` for the packed tokens (audio rows are then
overwritten by the caller's slices of the encoded clips), `forward`, and `compute_logits` for the rows that sample.
With tensor parallelism each rank holds a part of the decoder, and rank 0 alone the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model import fp8
from model.attention.base import AttentionBackend, AttentionMetadata
from model.audio_encoder import AudioEncoder
from model.clip_pack import PackedClips, Samples, pack_clips
from model.config import Qwen2AudioConfig, num_audio_tokens
from model.linear import Linear
from model.parallel import WHOLE, Shard
from model.qwen2 import Qwen2Decoder


class Qwen2Audio(nn.Module):
    """The whole model. Parameters are uninitialised noise until `model.loader` fills them."""

    def __init__(self, config: Qwen2AudioConfig, backend: AttentionBackend, shard: Shard = WHOLE) -> None:
        """config: its decoder is the rank's, as `Shard.share` gives it."""
        super().__init__()
        self.config = config
        self.backend = backend
        self.shard = shard
        if shard.rank == 0:
            self.audio_tower = AudioEncoder(config.audio, backend)
            self.projector = Linear(config.audio.d_model, config.text.hidden_size)
        self.decoder = Qwen2Decoder(config.text, backend, shard)
        self.lm_head = Linear(config.text.hidden_size, shard.part(config.text.vocab_size), bias=False)
        if config.text.tie_word_embeddings:
            self.lm_head.weight = self.decoder.embed_tokens.weight

    @property
    def dtype(self) -> torch.dtype:
        """Precision of weights and activations."""
        return self.decoder.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.norm.weight.device

    @property
    def kv_cache_dtype(self) -> torch.dtype:
        """Precision of keys and values in the cache."""
        if self.decoder.layers[0].self_attn.kv_scales is not None:
            return fp8.DTYPE
        return self.backend.kv_cache_dtype(self.dtype, self.device)

    def encode_audio(self, clips: Sequence[Samples]) -> tuple[Tensor, ...]:
        """Clips to rows of the decoder's input, on rank 0.

        clips: float32 [S_i] at 16 kHz, on the host -> one [A_i, C] each.
        """
        pack = pack_clips(clips, self.device)
        rows = self.encode_mel(self.mel(pack), pack)
        return rows.split_with_sizes([num_audio_tokens(len(clip)) for clip in clips])

    def mel(self, pack: PackedClips) -> Tensor:
        """Spectrogram of all clips, blanks included. -> [num_mel_bins, S]."""
        return self.audio_tower.mel(pack)

    def encode_mel(self, mel: Tensor, pack: PackedClips) -> Tensor:
        """mel: [num_mel_bins, S] -> [A, C]: the rows of all clips, in order."""
        return self.projector(self.audio_tower(mel, pack))

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids: int32 [T] -> [T, C], on every rank."""
        return self.decoder.embed_tokens(token_ids)

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        kv: Tensor,
        metadata: AttentionMetadata,
        rows: Tensor | None = None,
    ) -> Tensor:
        """hidden: [T, C], positions: int32 [T], kv: [L, 2, N, P, Hkv, D] -> normalised hidden of `rows`, [R, C].

        rows: int64 [R]; None: all T.
        """
        return self.decoder(hidden, positions, kv, metadata, rows)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden: [B, C] -> float32 [B, V]; on ranks other than 0 their own columns."""
        return self.shard.gather_columns(self.lm_head(hidden)).float()


def unfilled(
    config: Qwen2AudioConfig,
    backend: AttentionBackend,
    dtype: torch.dtype,
    device: torch.device,
    shard: Shard = WHOLE,
) -> Qwen2Audio:
    """A model for inference with memory for its parameters, and in it whatever there was. Nothing is tied."""
    with torch.device("meta"):
        model = Qwen2Audio(config, backend, shard).eval()
    for module in model.modules():  # not `to_empty`: of the meta device's tensors it asks what takes sympy to answer
        for name, parameter in module.named_parameters(recurse=False):
            memory = torch.empty(parameter.shape, dtype=dtype, device=device)
            module.register_parameter(name, nn.Parameter(memory, requires_grad=False))
    return model
