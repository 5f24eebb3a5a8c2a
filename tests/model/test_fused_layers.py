"""Fused layers in Triton against torch's, operator by operator, and a whole decoder with all of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from model.attention import AttentionMetadata
from model.attention.reference import ReferenceBackend
from model.config import TextConfig
from model.cuda import prepare_for_cuda
from model.layers import RMSNorm, SwiGlu
from model.parallel import WHOLE
from model.qwen2 import Qwen2Decoder
from model.qwen2_audio import Qwen2Audio
from model.triton_kernels.add_rms_norm import add_rms_norm, rms_norm
from model.triton_kernels.rotate_and_write import rotate_and_write
from model.triton_kernels.swiglu import swiglu
from tests.model.test_rotate_and_write import precisions

SHAPES = [(1, 16), (3, 33), (2, 512), (5, 1500)]
"""Rows and width."""


def rows(shape: tuple[int, int], scale: float, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device, dtype)


def norm_of(width: int, dtype: torch.dtype, device: torch.device) -> RMSNorm:
    norm = RMSNorm(width, 1e-6).to(device, dtype).requires_grad_(False)
    norm.weight.copy_(rows((1, width), 1.0, dtype, device, seed=9)[0])
    return norm


def assert_rounds_alike(ours: Tensor, reference: Tensor) -> None:
    """A sum in another order may tip a tie: rarely, and by one step of the precision at hand."""
    if ours.dtype != torch.float32:
        assert (ours == reference).float().mean() > 0.99
    step = 2 * torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours, reference, rtol=max(step, 1e-5), atol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_and_norm_round_as_the_layer_does(
    shape: tuple[int, int], scale: float, kernel_device: torch.device
) -> None:
    for dtype in precisions(kernel_device):
        norm = norm_of(shape[1], dtype, kernel_device)
        x, addend = (rows(shape, scale, dtype, kernel_device, seed) for seed in (1, 2))
        normed, total = add_rms_norm(x, addend, norm.weight, norm.eps)
        expected, expected_total = norm.after_adding(x, addend)
        assert torch.equal(total, expected_total)
        assert_rounds_alike(normed, expected)
        assert_rounds_alike(rms_norm(x, norm.weight, norm.eps), norm(x))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 2100)], ids=str)
def test_swiglu_rounds_as_the_layer_does(shape: tuple[int, int], scale: float, kernel_device: torch.device) -> None:
    for dtype in precisions(kernel_device):
        x = rows((shape[0], 2 * shape[1]), scale, dtype, kernel_device)
        assert_rounds_alike(swiglu(x), SwiGlu()(x))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_row_stays_broken_and_alone(poison: float, kernel_device: torch.device) -> None:
    x = rows((3, 32), 1.0, torch.float32, kernel_device)
    x[1, 5] = poison
    norm = norm_of(32, torch.float32, kernel_device)
    for ours, reference in (
        (rms_norm(x, norm.weight, norm.eps), norm(x)),
        (add_rms_norm(x, x, norm.weight, norm.eps)[0], norm(x + x)),
        (swiglu(x), SwiGlu()(x)),
    ):
        assert torch.equal(ours.isfinite(), reference.isfinite())
        assert ours[[0, 2]].isfinite().all()


def test_strided_rows_and_no_rows(kernel_device: torch.device) -> None:
    x = rows((12, 32), 1.0, torch.float16, kernel_device).view(6, 2, 32)[:, 1]
    weight = torch.ones(32, dtype=torch.float16, device=kernel_device)
    assert torch.equal(rms_norm(x, weight, 1e-6), rms_norm(x.contiguous(), weight, 1e-6))
    assert torch.equal(
        add_rms_norm(x, x, weight, 1e-6)[1], add_rms_norm(x.contiguous(), x.contiguous(), weight, 1e-6)[1]
    )
    assert torch.equal(swiglu(x), swiglu(x.contiguous()))
    assert rms_norm(x[:0], weight, 1e-6).shape == (0, 32)
    assert swiglu(x[:0]).shape == (0, 16)


class FusedBackend(ReferenceBackend):
    """Attention in torch behind the fused rotary embedding and cache write: each query gives itself back."""

    name = "fused"

    def decode(
        self,
        heads: Tensor,
        cos: Tensor,
        sin: Tensor,
        kv_layer: Tensor,
        metadata: AttentionMetadata,
        kv_scales: Tensor | None = None,
    ) -> Tensor:
        query = rotate_and_write(heads, cos, sin, kv_layer, metadata.slot_mapping)
        out = torch.empty_like(query)
        read = kv_layer.flatten(1, 2)[:, metadata.slot_mapping.long()]
        self._attend_sequences(query, read[0], read[1], kv_layer, metadata, out)
        return out


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_a_decoder_of_fused_kernels_equals_the_plain_one(num_kv_heads: int, kernel_device: torch.device) -> None:
    config = TextConfig(
        vocab_size=40, hidden_size=48, intermediate_size=72, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=num_kv_heads,
    )  # fmt: skip
    torch.manual_seed(0)
    plain, fused = (Qwen2Decoder(config, backend, WHOLE) for backend in (ReferenceBackend(), FusedBackend()))
    fused.load_state_dict(plain.state_dict())
    for decoder in (plain, fused):
        decoder.to(kernel_device).requires_grad_(False)
    model = SimpleNamespace(decoder=fused, backend=fused.layers[0].self_attn.backend, modules=fused.modules)
    prepare_for_cuda(cast(Qwen2Audio, model))
    assert all(module.add_kernel for module in fused.modules() if isinstance(module, RMSNorm))
    caches = [torch.zeros(2, 2, 4, 4, num_kv_heads, 16, device=kernel_device) for _ in range(2)]
    for start, count in ((0, 5), (5, 1), (6, 3)):
        hidden = rows((count, 48), 1.0, torch.float32, kernel_device, seed=start)
        positions = torch.arange(start, start + count, dtype=torch.int32, device=kernel_device)
        metadata = step_metadata(start, count, kernel_device)
        outputs = [
            decoder(hidden.clone(), positions, cache, metadata)
            for decoder, cache in zip((plain, fused), caches, strict=True)
        ]
        torch.testing.assert_close(outputs[1], outputs[0], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(caches[1], caches[0], atol=2e-5, rtol=2e-5)


def step_metadata(start: int, count: int, device: torch.device) -> AttentionMetadata:
    """One sequence in blocks 2, 1 and 3 of four tokens."""
    place = torch.arange(start, start + count)
    blocks = torch.tensor([2, 1, 3])
    fields: dict[str, Any] = {
        "query_lens": (count,),
        "seq_lens": (start + count,),
        "num_decodes": int(count == 1),
        "first_blocks": (None,),
        "block_table": blocks[None].int().to(device),
        "slot_mapping": (blocks[place // 4] * 4 + place % 4).int().to(device),
        "seq_lens_device": torch.tensor([start + count], dtype=torch.int32, device=device),
        "query_starts": torch.tensor([0, count], dtype=torch.int32, device=device),
    }
    return AttentionMetadata(**fields)


def test_with_the_reference_backend_nothing_is_fused(kernel_device: torch.device) -> None:
    config = TextConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    backend = ReferenceBackend()
    decoder = Qwen2Decoder(config, backend, WHOLE).to(kernel_device)
    model = SimpleNamespace(decoder=decoder, backend=backend, modules=decoder.modules)
    prepare_for_cuda(cast(Qwen2Audio, model))
    layers = [module for module in decoder.modules() if isinstance(module, RMSNorm | SwiGlu)]
    assert len(layers) == 4
    assert all(layer.kernel is None for layer in layers)


def test_on_a_cpu_the_product_adds_the_residual() -> None:
    """What travels beside the residual stays empty, so that oneDNN adds in float32 as before."""
    decoder = Qwen2Decoder(
        TextConfig(
            vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8,
            num_attention_heads=2, num_key_value_heads=2,
        ),
        ReferenceBackend(),
        WHOLE,
    ).requires_grad_(False)  # fmt: skip
    mlp = decoder.layers[0].mlp
    x, residual = (rows((3, 16), 1.0, torch.float32, torch.device("cpu"), seed) for seed in (3, 4))
    apart, addend = mlp(x, residual)
    assert apart is residual
    mlp.down_proj.pack()
    total, nothing = mlp(x, residual)
    assert nothing is None
    torch.testing.assert_close(total, residual + addend, atol=1e-5, rtol=1e-5)
