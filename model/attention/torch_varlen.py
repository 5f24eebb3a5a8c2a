"""FlashAttention 2 as it is built into torch: `torch.nn.attention.varlen`, whose functions page from torch 2.13 on.

A block of the cache is 256 tokens or a multiple. One call attends for a whole step, decodes and chunks; all lengths
that count are read on the device, so that a CUDA graph may hold it. On torch 2.11 and 2.12 there is no paging: only
the encoder could be served, and the backend is refused.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.base import AttentionMetadata
from model.attention.flash import FlashBackend

CAUSAL = (-1, 0)
"""The window: all keys before a query, none behind it."""


def _varlen_attn(*arguments: Any, **options: Any) -> Any:
    """Imported when it is needed: it brings torch's compiler along, a second of everybody's start."""
    return import_module("torch.nn.attention.varlen").varlen_attn(*arguments, **options)


class TorchVarlenBackend(FlashBackend):
    """See the module's docstring."""

    name = "torch_varlen"
    block_sizes: tuple[int, ...] = (256,)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata) -> Tensor:
        seq_lens = metadata.seq_lens_device
        out = _varlen_attn(
            query,
            keys,
            values,
            metadata.query_starts,
            F.pad(seq_lens.cumsum(0, dtype=torch.int32), (1, 0)),
            max(metadata.query_lens),
            metadata.block_table.shape[1] * keys.shape[1],
            window_size=CAUSAL,
            enable_gqa=query.shape[1] != keys.shape[2],
            seqused_k=seq_lens,
            block_table=metadata.block_table,
        )
        assert isinstance(out, Tensor), "nothing else was asked for"
        return out

    def _attend_clips(self, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int) -> Tensor:
        out = _varlen_attn(query, key, value, starts, starts, longest, longest)
        assert isinstance(out, Tensor), "nothing else was asked for"
        return out
