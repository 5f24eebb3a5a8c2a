"""Attention on a CPU: a compiled kernel over the paged cache for sequences with few queries, torch for the rest.

Prompts are products of matrices, which torch does well one sequence at a time (`reference`); decodes, and the few
tokens that speculation adds to them, read a cache that no product helps with (`paged_cpu`). In bfloat16 a prompt or
a clip is attended by a kernel of our own where the CPU multiplies bfloat16 (`dense_cpu`), else by two plain
products: torch's fused attention multiplies bfloat16 in a way that CPUs without AMX are slow at. The scores of the
plain products are rounded to bfloat16 on the way, as in the reference's eager attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.attention.base import AttentionMetadata
from model.attention.dense_cpu import DenseAttention, takes
from model.attention.paged_cpu import PagedAttention
from model.attention.reference import ReferenceBackend
from model.attention.rotate_cpu import rotate_and_write
from model.gemm_cpu import can_run

MAX_QUERIES = 16
"""Of a sequence, for the kernel: it reads all keys again for each."""

MAX_SCORES = 1 << 21
"""Computed at once: so many stay in a core's cache. A clip of 30 s goes head by head."""

MAX_CAUSAL_QUERIES = 128
"""Of a prompt, at once: what comes after the last of them is not computed at all."""


class CpuBackend(ReferenceBackend):
    """See the module's docstring. Holds compiled code and scratch memory, no state of any request."""

    name = "cpu"

    def __init__(self) -> None:
        super().__init__()
        self._kernels: dict[torch.dtype, PagedAttention] = {}
        self._dense: DenseAttention | None = None
        later = torch.full((MAX_CAUSAL_QUERIES, MAX_CAUSAL_QUERIES), float("-inf"), dtype=torch.bfloat16)
        self._later = later.triu(1)
        """Added to the scores of keys that come after their query."""

    def kv_cache_dtype(self, weights: torch.dtype, device: torch.device) -> torch.dtype:
        """As computed: half the memory of float32 in bfloat16, and nothing lost."""
        return super().kv_cache_dtype(weights, device) if weights == torch.float16 else weights

    def decode(
        self,
        heads: Tensor,
        cos: Tensor,
        sin: Tensor,
        kv_layer: Tensor,
        metadata: AttentionMetadata,
        kv_scales: Tensor | None = None,
    ) -> Tensor:
        """heads: [T, H + 2 Hkv, D]; cos, sin: [T, 1, D / 2]; kv_layer: [2, N, P, Hkv, D] -> [T, H, D]."""
        if heads.dtype == torch.float16 or kv_scales is not None:
            return super().decode(heads, cos, sin, kv_layer, metadata, kv_scales)
        num_kv_heads = kv_layer.shape[3]
        turned = rotate_and_write(heads, cos, sin, kv_layer, metadata.slot_mapping)
        query, key = torch.split(turned, [turned.shape[1] - num_kv_heads, num_kv_heads], dim=1)
        value = heads[:, -num_kv_heads:]
        query_lens = metadata.query_lens
        num_short = next((row for row, length in enumerate(query_lens) if length > MAX_QUERIES), len(query_lens))
        if num_short == 0:
            out = torch.empty_like(query, memory_format=torch.contiguous_format)
        else:
            kernel = self._kernels.get(query.dtype)
            if kernel is None:
                kernel = self._kernels[query.dtype] = PagedAttention(query.shape[2], kv_layer.shape[2], query.dtype)
            out = kernel(query, kv_layer, metadata, num_short)
        if num_short < len(query_lens):
            self._attend_sequences(query, key, value, kv_layer, metadata, out, first=num_short)
        return out

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
        """query: [Q, H, D]; key, value: [S, Hkv, D] -> [Q, H, D]."""
        if query.dtype != torch.bfloat16:
            return super()._attend(query, key, value, causal=causal)
        if can_run() and takes(query, key, value):
            self._dense = self._dense or DenseAttention()
            return self._dense(query, key, value, causal=causal)
        return self._attend_by_products(query, key, value, causal=causal)

    def _attend_by_products(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
        """As `_attend`, in bfloat16."""
        num_queries, num_heads = query.shape[:2]
        if (group := num_heads // key.shape[1]) > 1:
            key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        at_once = MAX_CAUSAL_QUERIES if causal else num_queries
        for start in range(0, num_queries, at_once):
            rows = slice(start, min(start + at_once, num_queries))
            visible = key.shape[0] - num_queries + rows.stop if causal else key.shape[0]
            self._attend_rows(query[rows], key[:visible], value[:visible], out[rows], causal=causal)
        return out

    def _attend_rows(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, *, causal: bool) -> None:
        """Heads in groups whose scores stay in cache. query, out: [Q, H, D]; key, value: [S, H, D], bfloat16."""
        num_queries, _, head_dim = query.shape
        at_once = max(1, MAX_SCORES // (num_queries * key.shape[0]))
        for q, k, v, o in zip(*(torch.split(x, at_once, dim=1) for x in (query, key, value, out)), strict=True):
            scores = torch.bmm((q * head_dim**-0.5).transpose(0, 1).contiguous(), k.transpose(0, 1).contiguous().mT)
            if causal:  # all rows see what is before them
                scores[:, :, -num_queries:].add_(self._later[:num_queries, :num_queries])
            o.copy_(torch.bmm(scores.softmax(-1), v.transpose(0, 1).contiguous()).transpose(0, 1))
