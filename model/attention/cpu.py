"""Attention on a CPU: a compiled kernel over the paged cache for sequences with few queries, torch for the rest.

Prompts are products of matrices, which torch does well one sequence at a time (`reference`); decodes, and the few
tokens that speculation adds to them, read a cache that no product helps with (`paged_cpu`). Clips in bfloat16 are
attended by two plain products: torch's fused attention multiplies bfloat16 in a way that CPUs without AMX are slow
at. The scores are rounded to bfloat16 on the way, as in the reference's eager attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.attention.base import AttentionMetadata, EncoderMetadata
from model.attention.paged_cpu import PagedAttention
from model.attention.reference import ReferenceBackend, write_kv

MAX_QUERIES = 16
"""Of a sequence, for the kernel: it reads all keys again for each."""

MAX_SCORES = 1 << 21
"""Of a clip, computed at once: so many stay in a core's cache. A clip of 30 s goes head by head."""


class CpuBackend(ReferenceBackend):
    """See the module's docstring. Holds compiled code and scratch memory, no state of any request."""

    name = "cpu"

    def __init__(self) -> None:
        super().__init__()
        self._kernels: dict[torch.dtype, PagedAttention] = {}

    def kv_cache_dtype(self, weights: torch.dtype, device: torch.device) -> torch.dtype:
        """As computed: half the memory of float32 in bfloat16, and nothing lost."""
        return super().kv_cache_dtype(weights, device) if weights == torch.float16 else weights

    def decode(
        self, query: Tensor, key: Tensor, value: Tensor, kv_layer: Tensor, metadata: AttentionMetadata
    ) -> Tensor:
        """query: [T, H, D]; key, value: [T, Hkv, D]; kv_layer: [2, N, P, Hkv, D] -> [T, H, D]."""
        if query.dtype == torch.float16:
            return super().decode(query, key, value, kv_layer, metadata)
        query_lens = metadata.query_lens
        num_short = next((row for row, length in enumerate(query_lens) if length > MAX_QUERIES), len(query_lens))
        num_tokens = sum(query_lens[:num_short])
        if num_tokens < query.shape[0]:
            write_kv(key[num_tokens:], value[num_tokens:], kv_layer, metadata.slot_mapping[num_tokens:])
        if num_short == 0:
            out = torch.empty_like(query, memory_format=torch.contiguous_format)
        else:
            kernel = self._kernels.get(query.dtype)
            if kernel is None:
                kernel = self._kernels[query.dtype] = PagedAttention(query.shape[2], kv_layer.shape[2], query.dtype)
            out = kernel(query, key, value, kv_layer, metadata, num_short)
        if num_short < len(query_lens):
            self._attend_sequences(query, key, value, kv_layer, metadata, out, first=num_short)
        return out

    def encode(self, query: Tensor, key: Tensor, value: Tensor, metadata: EncoderMetadata) -> Tensor:
        """query, key, value: [E, H, D] -> [E, H, D]."""
        if query.dtype != torch.bfloat16:
            return super().encode(query, key, value, metadata)
        out = torch.empty_like(query)
        clips = zip(*(torch.split(x, list(metadata.lens)) for x in (query, key, value, out)), strict=True)
        for q, k, v, o in clips:
            num_heads = max(1, MAX_SCORES // q.shape[0] ** 2)
            heads = zip(*(torch.split(x, num_heads, dim=1) for x in (q, k, v, o)), strict=True)
            for group in heads:
                _attend_heads(*group)
        return out


def _attend_heads(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    """Bidirectional, without a mask. All: [E, H, D]; `out` is filled."""
    scaled = (query * query.shape[2] ** -0.5).transpose(0, 1).contiguous()
    weights = torch.bmm(scaled, key.permute(1, 2, 0).contiguous()).softmax(-1)
    out.copy_(torch.bmm(weights, value.transpose(0, 1).contiguous()).transpose(0, 1))
