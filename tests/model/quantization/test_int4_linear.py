"""Weights that stay in four bits: the kernels against plain torch, and whole checkpoints against unpacked ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.attention.reference import ReferenceBackend
from model.config import Qwen2AudioConfig
from model.loader import load_model
from model.quantization.int4_linear import Int4Weight
from model.quantization.packing import GroupedWeight
from model.qwen2_audio import Qwen2Audio
from model.triton_kernels.int4_matmul import (
    MAX_ROWS,
    dequantise,
    dequantise_plain,
    int4_matmul,
    pack_words,
)
from model.weight_files import SINGLE_FILE
from tests.model.quantization.checkpoints import quantise

SHAPES = [(1, 128, 16, 1), (3, 256, 130, 4), (17, 384, 64, 3), (70, 256, 48, 16), (5, 1280, 32, 10)]
"""Rows, inputs, outputs, groups."""


def random_weight(num_inputs: int, num_outputs: int, num_groups: int) -> GroupedWeight:
    generator = torch.Generator().manual_seed(num_inputs + num_outputs)
    codes = torch.randint(0, 16, (num_inputs, num_outputs), generator=generator).to(torch.uint8)
    zeros = torch.randint(0, 16, (num_groups, num_outputs), generator=generator).to(torch.uint8)
    scales = torch.rand(num_groups, num_outputs, generator=generator).half() / 8
    return GroupedWeight(4, codes, zeros, scales, torch.arange(num_inputs) // (num_inputs // num_groups))


def precisions(device: torch.device) -> list[torch.dtype]:
    """The interpreter multiplies bfloat16 wrongly."""
    return [torch.bfloat16, torch.float16] if device.type == "cuda" else [torch.float32, torch.float16]


@pytest.mark.parametrize(("rows", "num_inputs", "num_outputs", "num_groups"), SHAPES)
def test_the_kernels_equal_plain_torch(
    rows: int, num_inputs: int, num_outputs: int, num_groups: int, kernel_device: torch.device
) -> None:
    weight = random_weight(num_inputs, num_outputs, num_groups)
    parts = [pack_words(weight.codes.T), weight.zeros, weight.scales]
    words, zeros, scales = (part.to(kernel_device) for part in parts)
    for dtype in precisions(kernel_device):
        dense = dequantise_plain(words, zeros, scales, dtype)
        assert torch.equal(dequantise(words, zeros, scales, dtype), dense)
        x = torch.randn(rows, num_inputs + 8, generator=torch.Generator().manual_seed(0))
        x = x.to(kernel_device, dtype)[:, :num_inputs]
        expected = x.double() @ dense.double()
        out = int4_matmul(x, words, zeros, scales)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.double(), expected, atol=2e-4, rtol=1e-4)
        assert int4_matmul(x[:0], words, zeros, scales).shape == (0, num_outputs)


def test_a_broken_row_is_not_a_number_and_its_neighbours_are(kernel_device: torch.device) -> None:
    weight = random_weight(128, 32, 1)
    parts = [part.to(kernel_device) for part in (pack_words(weight.codes.T), weight.zeros, weight.scales)]
    x = torch.ones(3, 128, device=kernel_device)
    x[1, 77] = float("nan")
    out = int4_matmul(x, *parts)
    assert out[1].isnan().all()
    assert out[::2].isfinite().all()


@pytest.mark.parametrize("rows", [0, 1, MAX_ROWS, MAX_ROWS + 1])
@pytest.mark.parametrize("bias", [True, False])
def test_parts_are_one_product(rows: int, bias: bool) -> None:
    parts = [random_weight(256, num_outputs, 2) for num_outputs in (48, 16, 16)]
    assert Int4Weight.fits(parts)
    weight = Int4Weight(parts, torch.device("cpu"))
    dense = torch.cat([part.dense() for part in parts])
    assert torch.equal(weight.dense(), dense)
    x = torch.randn(rows, 256)
    b = torch.randn(80) if bias else None
    torch.testing.assert_close(weight(x, b), torch.nn.functional.linear(x, dense, b), atol=1e-4, rtol=1e-4)
    assert weight(x.bfloat16(), None).dtype == torch.bfloat16


@pytest.mark.parametrize("odd", ["inputs", "group", "order", "bits", "parts"])
def test_what_the_kernels_do_not_take_is_told(odd: str) -> None:
    parts = [random_weight(256, 16, 2), random_weight(256, 32, 2)]
    if odd == "inputs":
        parts = [random_weight(192, 16, 2)]
    elif odd == "group":
        parts = [random_weight(256, 16, 32)]
    elif odd == "order":
        parts[1] = replace(parts[1], groups=parts[1].groups.flip(0))
    elif odd == "bits":
        parts[1] = replace(parts[1], bits=8)
    else:
        parts[1] = random_weight(256, 32, 4)
    assert not Int4Weight.fits(parts)


def load(folder: Path, **options: Any) -> Qwen2Audio:
    config = Qwen2AudioConfig.from_folder(folder)
    return load_model(folder, config, ReferenceBackend(), torch.float32, torch.device("cpu"), **options)


def packed_layers(model: Qwen2Audio) -> set[str]:
    names = {name for name, _ in model.decoder.named_parameters()}
    projections = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    return {f"{i}.{name}" for i in range(3) for name in projections if f"layers.{i}.{name}.weight" not in names}


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_packed_checkpoint_computes_what_the_unpacked_one_does(
    gqa_folder: Path, tmp_path: Path, method: str
) -> None:
    options = {} if method == "awq" else {"bits": 4, "v2": False, "act_order": False}
    folder = quantise(gqa_folder, tmp_path, method, **options) / "quantised"
    packed, plain = load(folder, keep_int4=True, fp8_kv=True), load(folder, fp8_kv=True)
    assert len(packed_layers(packed)) == 12
    assert not packed_layers(plain)
    x = torch.randn(5, 128)
    for ours, theirs in zip(packed.decoder.layers, plain.decoder.layers, strict=True):
        torch.testing.assert_close(ours.self_attn.qkv_proj(x), theirs.self_attn.qkv_proj(x), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.mlp(x, x), theirs.mlp(x, x), atol=1e-3, rtol=1e-3)
        assert ours.self_attn.kv_scales is not None
        assert theirs.self_attn.kv_scales is not None
        torch.testing.assert_close(ours.self_attn.kv_scales, theirs.self_attn.kv_scales)


def test_act_order_and_half_quantised_weights_are_unpacked(gqa_folder: Path, tmp_path: Path) -> None:
    shuffled = quantise(gqa_folder, tmp_path / "a", "gptq", bits=4, v2=False, act_order=True) / "quantised"
    assert not packed_layers(load(shuffled, keep_int4=True))
    half = quantise(gqa_folder, tmp_path / "b", "awq") / "quantised"
    name = "language_model.model.layers.1.self_attn.k_proj"
    plain: Tensor = load_file(gqa_folder / SINGLE_FILE)[f"{name}.weight"]
    tensors = load_file(half / SINGLE_FILE)
    for part in ("qweight", "qzeros", "scales"):
        del tensors[f"{name}.{part}"]
    save_file({**tensors, f"{name}.weight": plain}, half / SINGLE_FILE)
    model = load(half, keep_int4=True)
    assert packed_layers(load(half, keep_int4=True)).isdisjoint({"1.self_attn.qkv_proj"})
    assert len(packed_layers(model)) == 11
    expected = load(half).decoder.layers[1].self_attn.qkv_proj.weight
    assert torch.equal(model.decoder.layers[1].self_attn.qkv_proj.weight, expected)
