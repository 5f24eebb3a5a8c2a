"""FlashAttention 3, for Hopper: the module `flash_attn_interface`, built from flash-attention's folder `hopper`.

One call attends for a whole step, decodes and chunks, over blocks of any size. It plans on the device, from the
lengths there, in each call: a CUDA graph may hold it. The plan that it would take ready made (`scheduler_metadata`)
saves a small kernel a layer and is not given: its form, and who resets its counters, differ between builds.
How many parts a sequence's keys may be split into is bounded here by the shape of a step alone; how many they are is
decided on the device.
"""

from __future__ import annotations

from torch import Tensor

from model.attention.base import AttentionMetadata
from model.attention.flash import FlashPackage

MAX_SPLITS = 16
"""Of one sequence's keys. With 32 heads, 5 fill an H200."""
MAX_PARTIAL_ROWS = 1024
"""Tokens times splits. Of each a partial result is kept in float32: 16 MiB for 32 heads of 128."""


class FlashAttention3Backend(FlashPackage):
    """See the module's docstring. The package is `flash_attn_interface`."""

    name = "flash_attn_3"
    block_sizes: tuple[int, ...] = (16,)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata) -> Tensor:
        out: Tensor = self._package.flash_attn_with_kvcache(
            query,
            keys,
            values,
            cache_seqlens=metadata.seq_lens_device,
            page_table=metadata.block_table,
            cu_seqlens_q=metadata.query_starts,
            max_seqlen_q=max(metadata.query_lens),
            causal=True,
            num_splits=max(1, min(MAX_SPLITS, MAX_PARTIAL_ROWS // query.shape[0])),
        )
        return out
