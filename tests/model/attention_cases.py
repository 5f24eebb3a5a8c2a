"""Steps that every attention backend is tested with, and dense attention in float64, which judges them.

A backend's test makes a step in the precision and on the device that it is for, and compares with `expected`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.attention import AttentionBackend, AttentionMetadata

P = 16
D = 8
POOL = 64


@dataclass(frozen=True)
class Case:
    """(query tokens, keys in all) of each sequence of a step, decodes first."""

    name: str
    rows: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("one token", ((1, 1),)),
    Case("decode at page - 1", ((1, P - 1),)),
    Case("decode at page", ((1, P),)),
    Case("decode at page + 1", ((1, P + 1),)),
    Case("decodes of unequal lengths", ((1, 1), (1, P), (1, 3 * P + 5), (1, P + 1), (1, 2), (1, 100))),
    Case("whole prompt of page - 1", ((P - 1, P - 1),)),
    Case("whole prompt of one page", ((P, P),)),
    Case("whole prompt of page + 1", ((P + 1, P + 1),)),
    Case("two prompts", ((7, 7), (40, 40))),
    Case("second chunk on a page edge", ((P, 2 * P),)),
    Case("second chunk inside a page", ((9, 30),)),
    Case("last chunk of two tokens", ((2, 70),)),
    Case("chunk that ends a page", ((5, 2 * P),)),
    Case("drafts behind decodes", ((1, 33), (3, 40), (5, 5), (16, 50), (17, 60))),
    Case("decodes beside chunks", ((1, 33), (1, 16), (1, 1), (20, 52), (2, 2), (17, 17), (3, 64))),
]
HEADS = [(4, 4), (4, 2), (6, 1)]
PADDED_CASES = [
    Case("one padding row", ((1, 0),)),
    Case("padding rows after decodes", ((1, 17), (1, 40), (1, 0), (1, 0))),
    Case("a padding row among decodes", ((1, 16), (1, 0), (1, 1))),
]
"""What a captured step may bring: rows of length 0, whose slot is -1 and whose output is zeros."""
LONG_CASES = [
    Case("long decodes", ((1, 8192), (1, 1), (1, 4097), (1, 8191))),
    Case("long chunks", ((1, 8192), (1, 17), (100, 8192), (513, 2048))),
]
"""Up to the longest context."""


def make_step(
    case: Case,
    heads: tuple[int, int],
    stale: float,
    in_place: bool = False,
    block_size: int = P,
    head_dim: int = D,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Any, ...]:
    """Random queries, keys and values, and a cache whose unused slots hold `stale`.

    Blocks are scattered, or `in_place`: each sequence's are consecutive, and the metadata says so.

    -> query [T, H, D], key, value [T, Hkv, D] of the step, cache [2, N, P, Hkv, D], per-sequence keys and values,
    and the metadata; the null block holds zeros, as in the engine.
    """
    num_heads, num_kv_heads = heads
    generator = torch.Generator().manual_seed(len(case.rows) * 100 + num_heads)
    pool = max(POOL, 1 + sum(-(-length // block_size) for _, length in case.rows))
    order = (
        list(range(pool - 1, 0, -1)) if in_place else (torch.randperm(pool - 1, generator=generator) + 1).tolist()
    )
    cache = torch.full((2, pool, block_size, num_kv_heads, head_dim), stale).to(dtype)
    cache[:, 0] = 0.0
    tables, slots, queries, new, everything = [], [], [], [], []
    for num_queries, length in case.rows:
        table = [order.pop() for _ in range(-(-length // block_size))]
        kv = torch.randn(2, max(length, num_queries), num_kv_heads, head_dim, generator=generator).to(dtype)
        slot = torch.tensor([table[i // block_size] * block_size + i % block_size for i in range(length)] or [-1])
        past = max(0, length - num_queries)
        cache.flatten(1, 2)[:, slot[:past]] = kv[:, :past]
        tables.append(table)
        slots.append(slot[past:])
        new.append(kv[:, past:])
        everything.append(kv[:, :length].to(device))
        queries.append(torch.randn(num_queries, num_heads, head_dim, generator=generator).to(dtype))
    block_table = torch.zeros(len(tables), max(1, *map(len, tables)), dtype=torch.int32)
    for row, table in enumerate(tables):
        block_table[row, : len(table)] = torch.tensor(table)
    lens = tuple(length for _, length in case.rows)
    metadata = AttentionMetadata(
        query_lens=tuple(num for num, _ in case.rows),
        seq_lens=lens,
        num_decodes=sum(1 for num, _ in case.rows if num == 1),
        first_blocks=tuple(table[0] if in_place and table else None for table in tables),
        block_table=block_table.to(device),
        slot_mapping=torch.cat(slots).int().to(device),
        seq_lens_device=torch.tensor(lens, dtype=torch.int32, device=device),
        query_starts=torch.tensor([0, *(num for num, _ in case.rows)]).cumsum(0, dtype=torch.int32).to(device),
    )
    query, (key, value) = torch.cat(queries).to(device), torch.cat(new, dim=1).to(device)
    return query, key, value, cache.to(device), everything, metadata


def decode(backend: AttentionBackend, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """A step at position 0, which turns nothing."""
    half = query.new_ones(query.shape[0], 1, query.shape[2] // 2)
    return backend.decode(torch.cat((query, key, value), dim=1), half, torch.zeros_like(half), *rest)


def expected(query: Tensor, everything: list[Tensor], metadata: AttentionMetadata) -> Tensor:
    """What a step shall give. everything: each sequence's keys and values, [2, S, Hkv, D] -> float64 [T, H, D]."""
    pairs = zip(query.split(list(metadata.query_lens)), everything, strict=True)
    return torch.cat([dense(q, *kv) if kv.shape[1] else torch.zeros_like(q).double() for q, kv in pairs])


def dense(query: Tensor, key: Tensor, value: Tensor, causal: bool = True) -> Tensor:
    """The oracle. query: [Q, H, D]; key, value: [S, Hkv, D] -> float64 [Q, H, D]."""
    group = query.shape[1] // key.shape[1]
    q, k, v = query.double(), *(x.double().repeat_interleave(group, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,shd->hqs", q, k) / query.shape[2] ** 0.5
    if causal:
        num_queries, length = scores.shape[1:]
        hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(1 + length - num_queries)
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("hqs,shd->qhd", scores.softmax(-1), v)
