"""The paged KV cache's tensor: its shape and its size in bytes. Who owns which block is the engine's business."""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import TextConfig


def bytes_per_block(config: TextConfig, block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block over all layers, keys and values."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return block_size * per_token


def allocate_kv_cache(
    config: TextConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """-> zeros [L, 2, N, P, Hkv, D]. On a CPU the pages are not touched until they are written."""
    shape = (config.num_hidden_layers, 2, num_blocks, block_size, config.num_key_value_heads, config.head_dim)
    return torch.zeros(shape, dtype=dtype, device=device)
