"""Attention in plain torch: any device, any dtype, differentiable. The oracle for the other backends.

Decode gathers the batch's blocks into one scratch buffer that is kept (on a CPU a gather into fresh memory costs
eight times as much, all of it page faults) and does one masked attention over the padded batch. A prefill chunk
attends sequence by sequence. Encoder clips attend one by one: no padding, no mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.base import AttentionMetadata, EncoderMetadata


class ReferenceBackend:
    """See the module's docstring. Holds only scratch memory, no state of any request."""

    name = "reference"
    block_sizes: tuple[int, ...] = (16,)

    def __init__(self) -> None:
        self._scratch: Tensor | None = None

    def decode(
        self, query: Tensor, key: Tensor, value: Tensor, kv_layer: Tensor, metadata: AttentionMetadata
    ) -> Tensor:
        """query: [T, H, D]; key, value: [T, Hkv, D]; kv_layer: [2, N, P, Hkv, D] -> [T, H, D]."""
        slots = kv_layer.flatten(1, 2)  # [2, N * P, Hkv, D]
        slots[0].index_copy_(0, metadata.slot_mapping, key)
        slots[1].index_copy_(0, metadata.slot_mapping, value)
        out = torch.empty_like(query)
        n = metadata.num_decodes
        if n:
            out[:n] = self._decode_batch(query[:n], kv_layer, metadata)
        start = n
        for row in range(n, len(metadata.query_lens)):
            stop = start + metadata.query_lens[row]
            out[start:stop] = self._chunk(query[start:stop], kv_layer, metadata, row)
            start = stop
        return out

    def encode(self, query: Tensor, key: Tensor, value: Tensor, metadata: EncoderMetadata) -> Tensor:
        """query, key, value: [E, H, D] -> [E, H, D]."""
        clips = zip(*(torch.split(x, list(metadata.lens)) for x in (query, key, value)), strict=True)
        return torch.cat([_attend(q, k, v) for q, k, v in clips])

    def _decode_batch(self, query: Tensor, kv_layer: Tensor, metadata: AttentionMetadata) -> Tensor:
        """One query each. query: [B, H, D] -> [B, H, D]."""
        batch, num_heads, head_dim = query.shape
        block_size, num_kv_heads = kv_layer.shape[2:4]
        num_blocks = -(-max(metadata.seq_lens[:batch]) // block_size)
        table = metadata.block_table[:batch, :num_blocks].reshape(-1)
        keys, values = self._gather(kv_layer, table, batch)  # [B, S, Hkv, D]
        grouped = query.view(batch, num_kv_heads, num_heads // num_kv_heads, head_dim) * head_dim**-0.5
        scores = torch.matmul(grouped, keys.permute(0, 2, 3, 1)).float()  # [B, Hkv, G, S]
        past = torch.arange(keys.shape[1], device=query.device) >= metadata.seq_lens_device[:batch, None]
        weights = scores.masked_fill_(past[:, None, None], float("-inf")).softmax(-1).to(values.dtype)
        return torch.matmul(weights, values.transpose(1, 2)).view(batch, num_heads, head_dim)

    def _gather(self, kv_layer: Tensor, table: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Blocks of a batch, contiguous per sequence. table: [B * M] -> keys, values [B, M * P, Hkv, D]."""
        shape = (2, table.shape[0], *kv_layer.shape[2:])
        size = 2 * table.shape[0] * kv_layer[0, 0].numel()
        if self._scratch is None or self._scratch.numel() < size or self._scratch.dtype != kv_layer.dtype:
            self._scratch = torch.empty(size * 5 // 4, dtype=kv_layer.dtype, device=kv_layer.device)
        gathered = self._scratch[:size].view(shape)
        torch.index_select(kv_layer[0], 0, table, out=gathered[0])
        torch.index_select(kv_layer[1], 0, table, out=gathered[1])
        keys, values = gathered.view(2, batch, -1, *kv_layer.shape[3:])
        return keys, values

    def _chunk(self, query: Tensor, kv_layer: Tensor, metadata: AttentionMetadata, row: int) -> Tensor:
        """Prefill tokens of one sequence against all its keys so far. query: [Q, H, D] -> [Q, H, D]."""
        length = metadata.seq_lens[row]
        blocks = metadata.block_table[row, : -(-length // kv_layer.shape[2])]
        keys, values = kv_layer[:, blocks].flatten(1, 2)[:, :length]  # [S, Hkv, D]
        positions = torch.arange(length, device=query.device)
        visible = positions[None, :] <= positions[length - query.shape[0] :, None]
        return _attend(query, keys, values, visible)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """query: [Q, H, D], key and value: [S, Hkv, D], mask: bool [Q, S] or None -> [Q, H, D]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return out[0].transpose(0, 1)
