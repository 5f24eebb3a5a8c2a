"""Products in float8 against the numbers that they stand for, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.attention.reference import ReferenceBackend
from model.config import TextConfig
from model.errors import ConfigError
from model.linear import Linear
from model.parallel import WHOLE
from model.quantization.fp8_linear import Fp8Weight, round_to_fp8
from model.qwen2 import Qwen2Decoder
from model.triton_kernels.round_rows import round_rows, round_rows_plain
from tests.model.quantization.checkpoints import fp8 as stored_fp8

SHAPES = [(1, 16, 16), (3, 64, 48), (16, 48, 160), (130, 512, 32)]


def make(in_features: int, out_features: int, *, bias: bool = True) -> Linear:
    torch.manual_seed(in_features + out_features)
    return Linear(in_features, out_features, bias).bfloat16().requires_grad_(False)


def emulated(x: Tensor, weight: Fp8Weight, bias: Tensor | None) -> Tensor:
    """float64."""
    codes, scales = round_rows_plain(x)
    out = (codes.double() * scales.double()) @ (weight.codes.double() * weight.scales.double().T).T
    return out if bias is None else out + bias.double()


def devices() -> list[object]:
    return ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "in_features", "out_features"), SHAPES)
def test_a_product_is_that_of_the_rounded_numbers(
    rows: int, in_features: int, out_features: int, bias: bool, device: str
) -> None:
    layer = make(in_features, out_features, bias=bias).to(device)
    x = torch.randn(rows, 2 * in_features, device=device).bfloat16()[:, :in_features]
    residual = torch.randn(rows, out_features, device=device).bfloat16()
    plain = layer(x)
    weight = Fp8Weight(layer.weight)
    layer.replace_weight(weight)
    out = layer(x)
    assert out.dtype == torch.bfloat16
    expected = emulated(x, weight, layer.bias)
    torch.testing.assert_close(out.double(), expected, atol=0.01, rtol=0.01)
    torch.testing.assert_close(layer(x, residual).double(), expected + residual.double(), atol=0.02, rtol=0.02)
    assert (out - plain).norm() < 0.06 * plain.norm() + 0.02
    assert layer(x[:0]).shape == (0, out_features)
    assert {name for name, _ in layer.named_parameters()} == ({"bias"} if bias else set())


def test_every_weight_is_within_half_a_step_of_what_it_was() -> None:
    layer = make(64, 48)
    layer.weight[7] = 0.0  # an output without weights has no scale
    layer.weight[8] *= 1e-5
    weight = layer.weight.double()
    dense = Fp8Weight(layer.weight).dense().double()
    smallest = weight.abs().amax(1, keepdim=True) / 448 * 2**-9
    assert ((dense - weight).abs() <= torch.maximum(weight.abs() / 16, smallest) * 1.001).all()
    assert not dense[7].any()
    assert not torch.equal(dense, weight), "nothing was rounded"


def test_a_float8_checkpoint_by_output_is_rounded_to_the_numbers_that_it_stored() -> None:
    parts, dense = stored_fp8(torch.randn(48, 64, generator=torch.Generator().manual_seed(0)), per_channel=True)
    assert torch.equal(Fp8Weight(dense.bfloat16()).codes.float(), parts["weight"].float())


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_row_is_not_a_number_and_its_neighbours_are(poison: float) -> None:
    layer = make(32, 16)
    x = torch.randn(3, 32).bfloat16()
    expected = layer(x)
    x[1, 5] = poison
    layer.replace_weight(Fp8Weight(layer.weight))
    out = layer(x)
    assert out[1].isnan().all()
    torch.testing.assert_close(out[::2], expected[::2], atol=0.15, rtol=0.1)


def test_the_decoders_layers_are_rounded_and_nothing_else() -> None:
    config = TextConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    decoder = Qwen2Decoder(config, ReferenceBackend(), WHOLE).bfloat16().requires_grad_(False)
    round_to_fp8(decoder)
    left = {name for name, _ in decoder.named_parameters()}
    layer = {"input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.qkv_proj.bias"}
    assert left == {
        "embed_tokens.weight",
        "norm.weight",
        *(f"layers.{i}.{name}" for i in range(2) for name in layer),
    }


def test_shapes_that_float8_cannot_multiply_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--quantization fp8 .*\[24, 64\]"):
        Fp8Weight(torch.zeros(24, 64))


@pytest.mark.parametrize("width", [1, 48, 2048, 9000])
def test_rows_are_rounded_as_plain_torch_does(width: int, kernel_device: torch.device) -> None:
    wide = torch.randn(6, width + 8, generator=torch.Generator().manual_seed(width))
    wide[1] *= 1e-9
    wide[2] = 0.0
    wide[3, 0], wide[4, width - 1] = float("nan"), float("inf")
    wide[5] *= 1e9
    for dtype in (torch.float32, torch.bfloat16) if kernel_device.type == "cuda" else (torch.float32,):
        x = wide.to(kernel_device, dtype)[:, :width]
        codes, scales = round_rows(x)
        expected_codes, expected_scales = round_rows_plain(x)
        torch.testing.assert_close(scales, expected_scales, equal_nan=True, rtol=1e-6, atol=0)
        assert scales.isnan().flatten().tolist() == [False, False, False, True, True, False]
        whole = scales.isfinite().flatten()  # what stands in a row whose scale is not a number does not matter
        codes, expected = codes[whole].float(), expected_codes[whole].float()
        if kernel_device.type == "cpu":  # the interpreter's cast loses the carry into the next power of two
            expected = torch.where(expected.abs().log2().frac() == 0, codes, expected)
        assert torch.equal(codes, expected)
    assert round_rows(wide.to(kernel_device)[:0])[0].shape == (0, width + 8)
