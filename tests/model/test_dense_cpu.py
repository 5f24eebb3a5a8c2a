"""Attention of many queries on a CPU that multiplies bfloat16, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import select_backend
from model.attention.base import EncoderMetadata
from model.attention.dense_cpu import DenseAttention, takes
from model.gemm_cpu import can_run

pytestmark = pytest.mark.skipif(not can_run(), reason="this CPU does not multiply bfloat16")


def make(num_queries: int, num_keys: int, heads: int, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as they lie beside each other in the product of a layer."""
    generator = torch.Generator().manual_seed(num_keys + head_dim)
    packed = torch.randn(num_keys, heads + 2 * kv_heads, head_dim, generator=generator).bfloat16()
    query, key, value = packed.split([heads, kv_heads, kv_heads], dim=1)
    return query[num_keys - num_queries :], key, value


def exact(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    q, k, v = (x.double().transpose(0, 1)[None] for x in (query, key, value))
    mask = None
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (4, 2, 64), (3, 1, 128)])
@pytest.mark.parametrize(
    ("num_queries", "num_keys"), [(1, 1), (1, 65), (3, 3), (33, 33), (64, 64), (17, 129), (31, 190), (300, 300)]
)
def test_it_is_attention(
    num_queries: int, num_keys: int, heads: int, kv_heads: int, head_dim: int, causal: bool
) -> None:
    given = make(num_queries, num_keys, heads, kv_heads, head_dim)
    assert takes(*given)
    expected = exact(*given, causal=causal)
    attend = DenseAttention()
    attend(*make(200, 400, 4, 4, 128), causal=False)  # what it leaves in the scratch memory is not read
    ours = attend(*given, causal=causal).double()
    assert (ours - expected).norm() < 0.004 * expected.norm()


def test_large_scores_and_what_is_not_a_number() -> None:
    query, key, value = make(40, 40, 2, 2, 64)
    key *= 100
    expected = exact(query, key, value, causal=True)
    assert (DenseAttention()(query, key, value, causal=True) - expected).norm() < 0.004 * expected.norm()
    for poison in (float("nan"), -float("nan")):
        query[7, 1, 3] = poison
        found = DenseAttention()(query, key, value, causal=True).isnan().any(dim=2)
        assert found.nonzero().tolist() == [[7, 1]]


def test_clips_go_through_it_and_other_shapes_another_way() -> None:
    backend, _ = select_backend("cpu", torch.device("cpu"), dtype=torch.bfloat16)
    for head_dim in (64, 48):
        query, key, value = make(150, 150, 4, 4, head_dim)
        assert takes(query, key, value) == (head_dim == 64)
        clips = torch.cat(
            [exact(*(x[rows] for x in (query, key, value)), causal=False) for rows in (slice(90), slice(90, 150))]
        )
        ours = backend.encode(query, key, value, EncoderMetadata(lens=(90, 60))).double()
        assert (ours - clips).norm() < 0.008 * clips.norm()
    assert not takes(query.transpose(0, 1))
    assert not takes(query[:0])
