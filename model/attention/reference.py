"""Attention in plain torch: any device, any dtype, differentiable. The oracle for the other backends.

Sequences attend one by one: over the cache in place where their blocks are consecutive, else over blocks gathered
into a scratch buffer that is kept (on a CPU a gather into fresh memory costs several times as much, all of it page
faults). One sequence's keys still sit in the core's cache when they are used, which a padded batch's do not;
docs/decisions.md has the figures. Encoder clips attend one by one as well: no padding, no mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.base import AttentionMetadata, EncoderMetadata
from model.fp8 import movable, to_fp8
from model.layers import apply_rotary


class ReferenceBackend:
    """See the module's docstring. Holds only scratch memory, no state of any request."""

    name = "reference"
    block_sizes: tuple[int, ...] = (16,)
    supports_graphs = False
    supports_fp8_kv = True

    def __init__(self) -> None:
        self._scratch: Tensor | None = None

    def kv_cache_dtype(self, weights: torch.dtype, device: torch.device) -> torch.dtype:
        """On a CPU always float32: torch attends one query to bfloat16 keys several times slower."""
        return torch.float32 if device.type == "cpu" else weights

    def decode(
        self,
        heads: Tensor,
        cos: Tensor,
        sin: Tensor,
        kv_layer: Tensor,
        metadata: AttentionMetadata,
        kv_scales: Tensor | None = None,
    ) -> Tensor:
        """heads: [T, H + 2 Hkv, D]; cos, sin: [T, 1, D / 2]; kv_layer: [2, N, P, Hkv, D], any dtype -> [T, H, D]."""
        query, key, value = rotate(heads, cos, sin, kv_layer.shape[3])
        out = torch.empty_like(query)
        stored = (key, value) if kv_scales is None else quantise_kv(key, value, kv_scales)
        write_kv(*stored, kv_layer, metadata.slot_mapping, padded=0 in metadata.seq_lens)
        if kv_scales is None:
            self._attend_sequences(query, key, value, kv_layer, metadata, out)
        else:
            self._attend_quantised(query, kv_layer, metadata, kv_scales, out)
        return out

    def _attend_quantised(
        self, query: Tensor, kv_layer: Tensor, metadata: AttentionMetadata, kv_scales: Tensor, out: Tensor
    ) -> None:
        """Fill `out` from a cache in float8, in float32."""
        start = 0
        for row, (query_len, seq_len) in enumerate(zip(metadata.query_lens, metadata.seq_lens, strict=True)):
            stop = start + query_len
            stored = self._gather(kv_layer, metadata.block_table[row], seq_len)
            keys, values = (x.float() * scales[:, None] for x, scales in zip(stored, kv_scales, strict=True))
            out[start:stop] = self._attend(query[start:stop].float(), keys, values, causal=True)
            start = stop

    def _attend_sequences(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_layer: Tensor,
        metadata: AttentionMetadata,
        out: Tensor,
        first: int = 0,
    ) -> None:
        """Fill `out` for the sequences from `first` on."""
        slots = kv_layer.flatten(1, 2)  # [2, N * P, Hkv, D]
        block_size = kv_layer.shape[2]
        start = sum(metadata.query_lens[:first])
        for row in range(first, len(metadata.query_lens)):
            query_len, seq_len = metadata.query_lens[row], metadata.seq_lens[row]
            stop = start + query_len
            if query_len == seq_len:  # a whole prompt attends to itself, in its own precision
                keys, values = key[start:stop], value[start:stop]
            elif (block := metadata.first_blocks[row]) is not None:
                keys, values = slots[:, block * block_size : block * block_size + seq_len]
            else:
                keys, values = self._gather(kv_layer, metadata.block_table[row], seq_len)
            out[start:stop] = self._attend(query[start:stop].to(keys.dtype), keys, values, causal=True)
            start = stop

    def encode(self, query: Tensor, key: Tensor, value: Tensor, metadata: EncoderMetadata) -> Tensor:
        """query, key, value: [E, H, D] -> [E, H, D]."""
        clips = zip(*(torch.split(x, list(metadata.lens)) for x in (query, key, value)), strict=True)
        return torch.cat([self._attend(q, k, v, causal=False) for q, k, v in clips])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
        """One sequence, causal as bottom-right aligned. query: [Q, H, D]; key, value: [S, Hkv, D] -> [Q, H, D]."""
        num_queries, length = query.shape[0], key.shape[0]
        if length == 0:
            return torch.zeros_like(query)
        mask = None
        if causal and 1 < num_queries < length:
            mask = torch.ones(num_queries, length, dtype=torch.bool, device=query.device).tril(length - num_queries)
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        is_causal = causal and num_queries == length
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)
        return out[0].transpose(0, 1)

    def _gather(self, kv_layer: Tensor, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """A sequence's keys and values, contiguous. blocks: [M] -> two of [S, Hkv, D], valid until the next call."""
        block_size = kv_layer.shape[2]
        num_blocks = -(-length // block_size)
        size = 2 * num_blocks * kv_layer[0, 0].numel()
        if self._scratch is None or self._scratch.numel() < size or self._scratch.dtype != kv_layer.dtype:
            self._scratch = torch.empty(2 * size, dtype=kv_layer.dtype, device=kv_layer.device)
        keys, values = self._scratch[:size].view(2, num_blocks, *kv_layer.shape[2:])
        torch.index_select(movable(kv_layer[0]), 0, blocks[:num_blocks], out=movable(keys))
        torch.index_select(movable(kv_layer[1]), 0, blocks[:num_blocks], out=movable(values))
        return keys.flatten(0, 1)[:length], values.flatten(0, 1)[:length]


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """heads: [T, H + 2 Hkv, D]; cos, sin: [T, 1, D / 2] -> query [T, H, D], key and value [T, Hkv, D]."""
    num_heads = heads.shape[1] - 2 * num_kv_heads
    turning, value = torch.split(heads, [num_heads + num_kv_heads, num_kv_heads], dim=1)
    query, key = torch.split(apply_rotary(turning, cos, sin), [num_heads, num_kv_heads], dim=1)
    return query, key, value


def write_kv(key: Tensor, value: Tensor, kv_layer: Tensor, slot_mapping: Tensor, *, padded: bool = False) -> None:
    """Put this step's keys and values where they belong. key, value: [T, Hkv, D]; kv_layer: [2, N, P, Hkv, D].

    padded: some slots are -1, and nothing is written there.
    """
    slots = movable(kv_layer.flatten(1, 2))
    places = slot_mapping.long()  # index_copy_ takes no int32
    if padded:
        written = places >= 0
        places, key, value = places[written], key[written], value[written]
    slots[0].index_copy_(0, places, movable(key.to(kv_layer.dtype)))
    slots[1].index_copy_(0, places, movable(value.to(kv_layer.dtype)))


def quantise_kv(key: Tensor, value: Tensor, kv_scales: Tensor) -> tuple[Tensor, Tensor]:
    """key, value: [T, Hkv, D]; kv_scales: float32 [2, Hkv] -> what is stored of them, float8_e4m3fn."""
    key_scales, value_scales = kv_scales[..., None]
    return to_fp8(key / key_scales), to_fp8(value / value_scales)
