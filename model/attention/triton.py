"""Attention on a GPU by kernels of our own: split over keys for decodes, tiled for prompts, packed for the encoder.

Nothing is read back from the device, and no table is sent to it: which sequence a program serves, and how long that
is, it reads for itself. So a step is captured in a graph as it is. The leading sequences with few queries, decodes
and what speculation adds to them, go to one kernel, the rest to the other; all keys are read from the cache, the
step's own included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.attention.base import AttentionMetadata, EncoderMetadata
from model.triton_kernels.encoder_attention import encoder_attention
from model.triton_kernels.paged_decode import max_queries, paged_decode
from model.triton_kernels.paged_prefill import paged_prefill
from model.triton_kernels.rotate_and_write import rotate_and_write


class TritonBackend:
    """See the module's docstring. Holds no state. Head dims are powers of two, 16 or more."""

    name = "triton"
    block_sizes: tuple[int, ...] = (16,)
    supports_graphs = True
    supports_fp8_kv = True

    def kv_cache_dtype(self, weights: torch.dtype, device: torch.device) -> torch.dtype:  # noqa: ARG002
        """As computed."""
        return weights

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
        query = rotate_and_write(heads, cos, sin, kv_layer, metadata.slot_mapping, kv_scales)
        out = torch.empty_like(query)
        limit = max_queries(query.shape[1], kv_layer.shape[3])
        query_lens = metadata.query_lens
        num_short = next((row for row, length in enumerate(query_lens) if length > limit), len(query_lens))
        num_tokens = sum(query_lens[:num_short])
        tensors = (query, kv_layer, metadata.block_table, metadata.seq_lens_device, metadata.query_starts, out)
        if num_short:
            paged_decode(*tensors, num_short, num_tokens, kv_scales)
        if num_short < len(query_lens):
            paged_prefill(*tensors, num_short, num_tokens, kv_scales)
        return out

    def encode(self, query: Tensor, key: Tensor, value: Tensor, metadata: EncoderMetadata) -> Tensor:
        """query, key, value: [E, H, D], as the encoder's one product leaves them -> [E, H, D]."""
        assert metadata.starts is not None, "the encoder brings it"
        return encoder_attention(query, key, value, metadata.starts)
