"""Inputs of an attention backend as a layer hands them over: one step's heads, a paged cache, where things live.

Blocks are scattered over the cache, as they are after an hour of service. Several layers' caches go round, so that
none is found in a processor's cache.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.timing import num_copies
from model.attention import AttentionBackend, AttentionMetadata
from model.attention.reference import ReferenceBackend
from model.config import TextConfig
from model.layers import RotaryEmbedding

DTYPE = torch.bfloat16
FP8_SCALE = 0.02
"""Of keys and values in float8: normal numbers become up to 50 times as large, well within its range."""


@dataclass(frozen=True)
class Load:
    """A step for one layer. `layers` are caches to go round."""

    heads: Tensor
    """[T, H + 2 Hkv, D]"""
    cos: Tensor
    sin: Tensor
    layers: list[Tensor]
    """[2, N, P, Hkv, D] each."""
    metadata: AttentionMetadata
    kv_scales: Tensor | None
    kv_bytes: int
    """Keys and values that the step reads."""

    def decode(self, backend: AttentionBackend, layer: Tensor) -> Tensor:
        """-> [T, H, D]"""
        more = {} if self.kv_scales is None else {"kv_scales": self.kv_scales}
        return backend.decode(self.heads, self.cos, self.sin, layer, self.metadata, **more)

    def error(self, backend: AttentionBackend) -> float:
        """Largest difference to the plain backend's answer, over the largest number of that."""
        with torch.inference_mode():
            expected = self.decode(ReferenceBackend(), self.layers[0].clone()).float()
            answer = self.decode(backend, self.layers[0].clone()).float()
        return ((answer - expected).abs().max() / expected.abs().max()).item()


def takes_fp8(backend: AttentionBackend) -> bool:
    """Whether it attends to keys and values in float8."""
    known = "kv_scales" in inspect.signature(backend.decode).parameters
    return known and bool(getattr(backend, "supports_fp8_kv", False))


def make_load(
    text: TextConfig,
    backend: AttentionBackend,
    query_lens: tuple[int, ...],
    seq_lens: tuple[int, ...],
    device: torch.device,
    *,
    fp8: bool = False,
) -> Load:
    """Sequences with so many tokens in this step, so many in all; decodes first."""
    generator = torch.Generator(device).manual_seed(len(query_lens) + sum(seq_lens))
    block_size, kv_heads = backend.block_sizes[0], text.num_key_value_heads
    width = -(-max(seq_lens) // block_size)
    num_blocks = 1 + len(seq_lens) * width
    kv_dtype = torch.float8_e4m3fn if fp8 else backend.kv_cache_dtype(DTYPE, device)
    kv_bytes = 2 * sum(seq_lens) * kv_heads * text.head_dim * kv_dtype.itemsize
    shape = (2, num_blocks, block_size, kv_heads, text.head_dim)
    spread = 1 / FP8_SCALE if fp8 else 1.0
    layers = [
        torch.empty(shape, dtype=DTYPE, device=device).normal_(0, spread, generator=generator).to(kv_dtype)
        for _ in range(num_copies(kv_bytes, device))
    ]
    num_heads = text.num_attention_heads + 2 * kv_heads
    heads = torch.empty(sum(query_lens), num_heads, text.head_dim, dtype=DTYPE, device=device)
    starts = [0, *torch.tensor(query_lens).cumsum(0).tolist()]
    spans = list(zip(query_lens, seq_lens, strict=True))
    positions = torch.cat([torch.arange(total - new, total, dtype=torch.int32) for new, total in spans])
    table = 1 + torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(0)).view(-1, width)
    row_of_token = torch.repeat_interleave(torch.arange(len(spans)), torch.tensor(query_lens))
    slots = table[row_of_token, positions.long() // block_size] * block_size + positions % block_size
    cos, sin = RotaryEmbedding(text.head_dim, text.rope_theta).tables(positions.to(device), DTYPE)
    return Load(
        heads=heads.normal_(generator=generator),
        cos=cos,
        sin=sin,
        layers=layers,
        metadata=AttentionMetadata(
            query_lens=query_lens,
            seq_lens=seq_lens,
            num_decodes=next((row for row, length in enumerate(query_lens) if length != 1), len(query_lens)),
            first_blocks=(None,) * len(spans),
            block_table=table.int().to(device),
            slot_mapping=slots.int().to(device),
            seq_lens_device=torch.tensor(seq_lens, dtype=torch.int32, device=device),
            query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        ),
        kv_scales=torch.full((2, kv_heads), FP8_SCALE, device=device) if fp8 else None,
        kv_bytes=kv_bytes,
    )


def make_encoder_load(frames: int, num_heads: int, head_dim: int, device: torch.device) -> list[tuple[Any, ...]]:
    """Query, key and value of one clip, [E, H, D] each, cut from one product as the encoder cuts them; several."""
    generator = torch.Generator(device).manual_seed(frames)
    size = 3 * frames * num_heads * head_dim * DTYPE.itemsize
    made = []
    for _ in range(num_copies(size, device)):
        packed = torch.empty(frames, 3 * num_heads * head_dim, dtype=DTYPE, device=device).normal_(
            generator=generator
        )
        made.append(tuple(part.unflatten(-1, (num_heads, head_dim)) for part in packed.chunk(3, dim=-1)))
    return made
