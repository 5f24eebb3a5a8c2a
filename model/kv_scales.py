"""What a layer's keys and values are divided by before a float8 cache takes them: one scale for each head.

A float has as many digits at one magnitude as at another, so a scale must only keep the largest value from being
cut off and the usual ones from falling below 2^-6, where digits are lost; 14 binary orders lie between. The largest
value needs no calibration: behind RMSNorm an input has norm sqrt(C) at most, so by Cauchy and Schwarz no key is
larger than sqrt(C) |W g| + |b| in its row (g: the norm's weights), and RoPE turns two rows into each other at most.
The bound depends on the weights alone, whatever is said to the model later. Scales are powers of two, so that
dividing by them and multiplying again rounds nothing; those of a checkpoint are taken as they are.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from model import fp8
from model.qwen2 import DecoderLayer


def bounding_scales(layer: DecoderLayer) -> Tensor:
    """Scales that nothing exceeds, from weights that have not been packed. -> float32 [2, Hkv] on their device."""
    attention = layer.self_attn
    gain = layer.input_layernorm.weight.float()
    num_rows = 2 * attention.num_kv_heads * attention.head_dim
    weight, bias = attention.qkv_proj.dense_weight()[-num_rows:].float(), attention.qkv_proj.bias[-num_rows:].float()
    bound = gain.shape[0] ** 0.5 * (weight * gain).norm(dim=1) + bias.abs()
    keys, values = bound.view(2, attention.num_kv_heads, attention.head_dim)
    first, second = keys.chunk(2, dim=1)
    largest = torch.stack((torch.hypot(first, second).amax(1), values.amax(1)))
    return torch.exp2(torch.log2(largest.clamp(min=torch.finfo(torch.float32).tiny) / fp8.MAX).ceil())


def set_kv_scales(layers: Iterable[DecoderLayer], stored: dict[int, Tensor]) -> None:
    """Give each layer its scales: those of the checkpoint, float32 [2] or [2, Hkv], or bounds."""
    for index, layer in enumerate(layers):
        scales = stored.get(index)
        if scales is None:
            layer.self_attn.kv_scales = bounding_scales(layer)
        else:
            wide = scales.reshape(2, -1).expand(2, layer.self_attn.num_kv_heads)
            layer.self_attn.kv_scales = wide.to(layer.input_layernorm.weight.device).contiguous()
