"""What the three ways to FlashAttention share: `flash_attn`, `flash_attn_3`, `torch_varlen`.

Their kernels take queries, keys and values in one precision, float16 or bfloat16, with any strides as long as the
numbers of a head lie side by side; int32 lengths and block tables on the device. They align the causal mask at the
bottom right, scale by D ** -0.5 and give zeros to a sequence without keys. What they read of the cache is written
before, by a kernel of ours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import accumulate
from types import ModuleType

import torch
from torch import Tensor

from model.attention.base import AttentionMetadata, EncoderMetadata
from model.triton_kernels.rotate_and_write import rotate_and_write


class FlashBackend(ABC):
    """See the module's docstring. Holds where the sequences of the last run began, no state of any request."""

    supports_graphs = True
    supports_fp8_kv = False

    def __init__(self) -> None:
        self._clip_starts = Starts()

    def kv_cache_dtype(self, weights: torch.dtype, device: torch.device) -> torch.dtype:  # noqa: ARG002
        """That of the queries."""
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
        assert kv_scales is None, "a float8 cache would need queries in float8 too"
        query = rotate_and_write(heads, cos, sin, kv_layer, metadata.slot_mapping)
        return self._attend(query, kv_layer[0], kv_layer[1], metadata)

    def encode(self, query: Tensor, key: Tensor, value: Tensor, metadata: EncoderMetadata) -> Tensor:
        """query, key, value: [E, H, D] -> [E, H, D]."""
        starts = self._clip_starts(metadata.lens, query.device) if metadata.starts is None else metadata.starts
        return self._attend_clips(query, key, value, starts, max(metadata.lens))

    @abstractmethod
    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata) -> Tensor:
        """query: [T, H, D]; keys, values: [N, P, Hkv, D] -> [T, H, D]."""

    @abstractmethod
    def _attend_clips(self, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int) -> Tensor:
        """query, key, value: [E, H, D]; starts: int32 [clips + 1] -> [E, H, D]."""


class FlashPackage(FlashBackend):
    """By a package of FlashAttention's authors; versions 2 and 3 name what they share alike."""

    def __init__(self, package: ModuleType) -> None:
        super().__init__()
        self._package = package

    def _attend_clips(self, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int) -> Tensor:
        out = self._package.flash_attn_varlen_func(
            query,
            key,
            value,
            cu_seqlens_q=starts,
            cu_seqlens_k=starts,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=False,
        )
        return out[0] if isinstance(out, tuple) else out  # older builds of 3 give the log-sum-exp along with it


class Starts:
    """Where rows begin that are laid end to end. Brought to the device once for all layers of a run, which agree."""

    def __init__(self) -> None:
        self._of: tuple[tuple[int, ...], torch.device] | None = None
        self._starts = torch.empty(0)

    def __call__(self, lens: tuple[int, ...], device: torch.device) -> Tensor:
        """int32 [B + 1], the end included. Does not wait for the device."""
        if self._of != (lens, device):
            starts = torch.tensor([0, *accumulate(lens)], dtype=torch.int32)
            self._starts = starts.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else starts
            self._of = lens, device
        return self._starts
