"""Keys and values in float8: what is stored, what is attended to, and the scales that keep them in range."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model import fp8
from model.attention.cpu import CpuBackend
from model.attention.reference import ReferenceBackend
from model.config import TextConfig
from model.kv_cache import allocate_kv_cache, bytes_per_block, copy_blocks
from model.kv_scales import bounding_scales
from model.parallel import WHOLE
from model.qwen2 import Qwen2Decoder
from tests.model.test_attention import CASES, HEADS, Case, P, decode, dense, make_step

BACKENDS = [ReferenceBackend, CpuBackend]
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)


def scales_of(num_kv_heads: int) -> Tensor:
    """A scale of its own for each head. -> [2, Hkv]."""
    return torch.linspace(0.003, 0.4, 2 * num_kv_heads).view(2, num_kv_heads)


def quantised(kv: Tensor, scales: Tensor) -> Tensor:
    """kv: [2, S, Hkv, D] -> float8."""
    return (kv / scales[:, None, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn)


def make_fp8_step(case: Case, heads: tuple[int, int]) -> tuple[Tensor, ...]:
    """As `make_step`, the cache in float8. -> query, key, value, cache, dequantised keys and values, metadata."""
    query, key, value, cache, everything, metadata = make_step(case, heads, 0.0)
    scales = scales_of(heads[1])
    stored = quantised(cache.flatten(1, 2), scales).view(cache.shape)
    attended = [quantised(kv, scales).float() * scales[:, None, :, None] for kv in everything]
    return query, key, value, stored, attended, metadata


@every_backend
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_attends_to_what_is_stored_chunk_or_whole(
    case: Case, heads: tuple[int, int], backend: type[ReferenceBackend]
) -> None:
    query, key, value, cache, attended, metadata = make_fp8_step(case, heads)
    out = decode(backend(), query, key, value, cache, metadata, scales_of(heads[1]))
    expected = [dense(q, *kv) for q, kv in zip(query.split(list(metadata.query_lens)), attended, strict=True)]
    torch.testing.assert_close(out.double(), torch.cat(expected), atol=2e-6, rtol=1e-5)


@every_backend
def test_what_is_stored_saturates_and_not_a_number_stays_so(backend: type[ReferenceBackend]) -> None:
    query, key, value, cache, _, metadata = make_fp8_step(Case("two", ((1, 20), (1, 20))), (4, 2))
    scales = scales_of(2)
    key[:, 0, 0] = torch.tensor([1e6, -1e6])
    value[0, 1, 2] = float("nan")
    out = decode(backend(), query, key, value, cache, metadata, scales)
    written = cache.flatten(1, 2).float()[:, metadata.slot_mapping.long()]
    assert written[0, :, 0, 0].tolist() == [448.0, -448.0]
    assert written[1].isnan().nonzero().tolist() == [[0, 1, 2]]
    assert out[0, 2:].isnan().any(), "the broken request must be seen"
    assert out[1].isfinite().all()


def test_blocks_take_half_of_bfloat16_and_are_copied_whole() -> None:
    config = TextConfig(
        num_hidden_layers=2, num_key_value_heads=2, num_attention_heads=4, head_dim=8, hidden_size=32
    )
    assert 2 * bytes_per_block(config, P, fp8.DTYPE) == bytes_per_block(config, P, torch.bfloat16)
    cache = allocate_kv_cache(config, 4, P, fp8.DTYPE, torch.device("cpu"))
    assert not cache[:, :, 0].float().any()
    cache[:, :, 1] = torch.randn(2, 2, P, 2, 8).to(fp8.DTYPE)
    before = cache.clone()
    copy_blocks(cache[:, :, :], torch.tensor([[1, 3], [0, 1]]))  # block 1 is read before it is written
    assert torch.equal(cache[:, :, 3].view(torch.uint8), before[:, :, 1].view(torch.uint8))
    assert not cache[:, :, 1].float().any()


@pytest.mark.parametrize("magnitude", [1e-6, 0.02, 1.0, 300.0])
def test_no_input_makes_a_key_or_a_value_that_the_scales_cut_off(magnitude: float) -> None:
    torch.manual_seed(0)
    config = TextConfig(
        vocab_size=8, hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    decoder = Qwen2Decoder(config, ReferenceBackend(), WHOLE).requires_grad_(False)
    (layer,) = decoder.layers
    attention = layer.self_attn
    attention.qkv_proj.weight.normal_(std=magnitude)
    attention.qkv_proj.bias.normal_(std=10 * magnitude)
    layer.input_layernorm.weight.normal_(std=3.0)
    scales = bounding_scales(layer)
    assert torch.equal(scales.log2(), scales.log2().round()), "powers of two"
    along = attention.qkv_proj.weight[-4 * 16 :] * layer.input_layernorm.weight  # each row's own weights
    worst = 100 * along / along.norm(dim=1, keepdim=True)  # so large that the norm's epsilon is nothing
    rows = torch.cat((worst, -worst, torch.randn(100, 64), torch.zeros(1, 64)))
    out = attention.qkv_proj(layer.input_layernorm(rows))[:, -4 * 16 :].view(-1, 2, 2, 16)
    largest = torch.stack((torch.hypot(*out[:, 0].chunk(2, dim=-1)).amax((0, 2)), out[:, 1].abs().amax((0, 2))))
    assert (largest <= scales * fp8.MAX).all()
    assert (largest[1] > scales[1] * fp8.MAX / 4).all(), "and they waste less than two binary orders"
