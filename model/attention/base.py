"""The attention protocol: what a layer hands over, what a backend promises.

Decoder attention is causal over a paged cache, bottom-right aligned: the last query of a sequence sees all its
keys. Encoder attention is bidirectional within each clip of a packed batch. Metadata is built once per step and
passed as an argument; there is no global context. Host copies of the lengths travel beside the device tensors so
that no backend has to read a tensor back (a device sync) to plan its work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where the packed tokens of one step live. Decodes (one query each) come first, then prefill chunks."""

    query_lens: tuple[int, ...]
    """Tokens of each sequence in this step."""
    seq_lens: tuple[int, ...]
    """Keys of each sequence, this step's tokens included."""
    num_decodes: int
    """The first so many sequences have exactly one query."""
    first_blocks: tuple[int | None, ...]
    """The first block of each sequence whose blocks are consecutive, so that they can be used in place."""
    block_table: Tensor
    """int32 [B, M]: the blocks of each sequence; entries past its length are 0."""
    slot_mapping: Tensor
    """int32 [T]: block * P + offset, where each token's key and value go."""
    seq_lens_device: Tensor
    """int32 [B]: `seq_lens` on the device."""
    query_starts: Tensor
    """int32 [B + 1]: where each sequence's tokens begin, and T; on the device."""


@dataclass(frozen=True, slots=True)
class EncoderMetadata:
    """Clips of one packed encoder run."""

    lens: tuple[int, ...]
    """Encoder frames of each clip, in packed order; upper bounds while a run is captured."""
    starts: Tensor | None = None
    """int32 [clips + 1]: where each clip's frames begin, and E; on the device, for backends that read it there."""


class AttentionBackend(Protocol):
    """One implementation of both attentions."""

    name: str
    block_sizes: tuple[int, ...]
    """Block sizes it supports, the preferred one first."""
    supports_graphs: bool
    """Whether what it queues depends on device tensors and on the shapes of a step alone, so that it can be captured
    and replayed. Host lengths are upper bounds then; rows of length 0 with slot -1 write nothing and give zeros."""
    supports_fp8_kv: bool
    """Whether `decode` takes `kv_scales`."""

    def kv_cache_dtype(self, weights: torch.dtype, device: torch.device) -> torch.dtype:
        """The precision in which keys and values are kept for weights of a precision."""
        ...

    def decode(
        self,
        heads: Tensor,
        cos: Tensor,
        sin: Tensor,
        kv_layer: Tensor,
        metadata: AttentionMetadata,
        kv_scales: Tensor | None = None,
    ) -> Tensor:
        """Turn queries and keys by their positions, write this step's keys and values to the cache, then attend.

        heads: [T, H + 2 Hkv, D], the queries, the keys, the values; cos, sin: [T, 1, D / 2];
        kv_layer: [2, N, P, Hkv, D] -> [T, H, D].
        kv_scales: float32 [2, Hkv], given exactly when the cache is float8_e4m3fn: a key is what is stored times its
        head's kv_scales[0], a value times kv_scales[1]. What is stored saturates at 448, and NaN stays NaN. A prompt
        attends to what is stored of it, so that chunks and cached prefixes give the answer of a whole one.
        """
        ...

    def encode(self, query: Tensor, key: Tensor, value: Tensor, metadata: EncoderMetadata) -> Tensor:
        """Bidirectional attention within each clip. query, key, value: [E, H, D] -> [E, H, D]."""
        ...
