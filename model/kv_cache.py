"""The paged KV cache's tensor: its shape, its size, copies of blocks. Who owns a block is the engine's business."""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import TextConfig
from model.fp8 import movable


def bytes_per_block(config: TextConfig, block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block over all layers, keys and values."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return block_size * per_token


def allocate_kv_cache(
    config: TextConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """-> [L, 2, N, P, Hkv, D], uninitialised but for the null block, so that on a CPU no page is touched before use.

    (`torch.zeros` writes every page on a CPU: 2 GiB resident at once.)
    """
    shape = (config.num_hidden_layers, 2, num_blocks, block_size, config.num_key_value_heads, config.head_dim)
    kv_cache = torch.empty(shape, dtype=dtype, device=device)
    movable(kv_cache)[:, :, 0].zero_()
    return kv_cache


def copy_blocks(kv_cache: Tensor, pairs: Tensor) -> None:
    """Copy whole blocks in all layers: all are read before any is written. pairs: int64 [K, 2], (from, to) each.

    Targets differ. What has been read waits in memory: that of one layer's keys or values at a time.
    """
    sources, targets = pairs.unbind(1)
    for layer in movable(kv_cache):
        for blocks in layer:
            blocks[targets] = blocks[sources]
