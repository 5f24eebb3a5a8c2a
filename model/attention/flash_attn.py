"""FlashAttention 2: the package flash-attn, for GPUs of compute capability 8.0 and later.

A block of its paged cache is 256 tokens or a multiple. Decodes go through `flash_attn_with_kvcache`, which splits
long contexts over the device and takes all lengths from there, so that a CUDA graph may hold it; chunks of prompts
go through `flash_attn_varlen_func`.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from model.attention.base import AttentionMetadata
from model.attention.flash import FlashPackage, Starts


class FlashAttentionBackend(FlashPackage):
    """See the module's docstring. The package is `flash_attn`."""

    name = "flash_attn"
    block_sizes: tuple[int, ...] = (256,)

    def __init__(self, package: ModuleType) -> None:
        super().__init__(package)
        self._query_starts, self._key_starts = Starts(), Starts()

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata) -> Tensor:
        num_decodes = metadata.num_decodes
        if num_decodes == 0:
            return self._attend_chunks(query, keys, values, metadata)
        decoded = self._package.flash_attn_with_kvcache(
            query[:num_decodes, None],
            keys,
            values,
            cache_seqlens=metadata.seq_lens_device[:num_decodes],
            block_table=metadata.block_table[:num_decodes],
            causal=True,
        )[:, 0]
        if num_decodes == len(metadata.query_lens):
            return decoded
        return torch.cat((decoded, self._attend_chunks(query[num_decodes:], keys, values, metadata)))

    def _attend_chunks(self, query: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata) -> Tensor:
        """The sequences behind the decodes, of which `query` is."""
        query_lens = metadata.query_lens[metadata.num_decodes :]
        seq_lens = metadata.seq_lens[metadata.num_decodes :]
        return self._package.flash_attn_varlen_func(
            query,
            keys,
            values,
            cu_seqlens_q=self._query_starts(query_lens, query.device),
            cu_seqlens_k=self._key_starts(seq_lens, query.device),
            max_seqlen_q=max(query_lens),
            max_seqlen_k=max(seq_lens),
            causal=True,
            block_table=metadata.block_table[metadata.num_decodes :],
        )
