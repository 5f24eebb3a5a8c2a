"""Quantised checkpoints load as the dense ones that they stand for, or are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.attention.reference import ReferenceBackend
from model.config import Qwen2AudioConfig
from model.errors import CheckpointError, ConfigError
from model.loader import load_model
from model.parallel import Shard
from model.quantization.scheme import QuantizationScheme, parse_quantization
from model.qwen2_audio import Qwen2Audio
from model.weight_files import INDEX_FILE, SINGLE_FILE
from tests.model.quantization.checkpoints import config_of, quantise

LAYER = "language_model.model.layers.1"
KINDS: dict[str, dict[str, Any]] = {
    "awq": {"method": "awq"},
    "gptq": {"method": "gptq", "bits": 4, "v2": False, "act_order": False},
    "gptq with act-order": {"method": "gptq", "bits": 4, "v2": False, "act_order": True},
    "gptq of 8 bits, format 2, one group": {
        "method": "gptq", "bits": 8, "v2": True, "act_order": False, "group_size": -1,
    },
    "fp8 by channel": {"method": "fp8", "per_channel": True},
    "fp8 by tensor": {"method": "fp8", "per_channel": False},
}  # fmt: skip


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Qwen2Audio:
    config = Qwen2AudioConfig.from_folder(folder)
    return load_model(folder, config, ReferenceBackend(), dtype, torch.device("cpu"), **options)


@pytest.fixture(scope="module")
def awq_folder(gqa_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantise(gqa_folder, tmp_path_factory.mktemp("awq"), "awq") / "quantised"


@pytest.fixture
def copy(awq_folder: Path, tmp_path: Path) -> Path:
    """A quantised checkpoint that a test may spoil."""
    return Path(shutil.copytree(awq_folder, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, folder / SINGLE_FILE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_what_its_numbers_mean(
    gqa_folder: Path, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    """Fused ones among them: q, k and v come from three packed tensors, which are not equally wide."""
    both = quantise(gqa_folder, tmp_path, **KINDS[kind])
    seen: list[tuple[int, int]] = []
    ours = load(both / "quantised", dtype, progress=lambda done, total: seen.append((done, total)))
    expected = dict(load(both / "dense", dtype).named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert seen[-1][0] == seen[-1][1] == len(seen)


def test_parts_may_lie_in_different_shards(awq_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(awq_folder, tmp_path / "sharded"))
    tensors = load_file(folder / SINGLE_FILE)
    (folder / SINGLE_FILE).unlink()
    weight_map = {name: f"model-{name.endswith('scales')}.safetensors" for name in tensors}
    for file in set(weight_map.values()):
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, folder / file)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    expected = dict(load(awq_folder).named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in load(folder).named_parameters())


def test_modules_that_were_left_alone_load_as_they_are(copy: Path, gqa_folder: Path) -> None:
    plain = load_file(gqa_folder / SINGLE_FILE)[f"{LAYER}.mlp.up_proj.weight"]

    def restore(tensors: dict[str, Tensor]) -> None:
        for part in ("qweight", "qzeros", "scales"):
            del tensors[f"{LAYER}.mlp.up_proj.{part}"]
        tensors[f"{LAYER}.mlp.up_proj.weight"] = plain

    edit(copy, restore)
    assert torch.equal(load(copy).decoder.layers[1].mlp.gate_up_proj.weight[256:], plain)


@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_a_missing_part_is_named(copy: Path, part: str) -> None:
    edit(copy, lambda tensors: tensors.pop(f"{LAYER}.self_attn.k_proj.{part}"))
    with pytest.raises(CheckpointError, match=rf"k_proj\.{part} is missing"):
        load(copy)


def test_a_weight_beside_its_packed_form_is_named(copy: Path) -> None:
    edit(copy, lambda tensors: tensors.update({f"{LAYER}.self_attn.k_proj.weight": torch.zeros(64, 128)}))
    with pytest.raises(CheckpointError, match=r"k_proj\.weight is not part of the model"):
        load(copy)


@pytest.mark.parametrize("part", ["qweight", "scales"])
def test_a_part_of_a_wrong_shape_is_named(copy: Path, part: str) -> None:
    name = f"{LAYER}.self_attn.k_proj.{part}"
    edit(copy, lambda tensors: tensors.update({name: tensors[name][:, :-1].contiguous()}))
    with pytest.raises(CheckpointError, match="k_proj"):
        load(copy)


def test_packed_weights_without_a_config_are_named(copy: Path, gqa_folder: Path) -> None:
    shutil.copy(gqa_folder / "config.json", copy / "config.json")
    with pytest.raises(CheckpointError, match=r"down_proj\.weight"):
        load(copy)


@pytest.mark.parametrize("names", [("k_proj.k_scale", "v_proj.v_scale"), ("attn.k_scale", "attn.v_scale")], ids=str)
def test_scales_of_a_kv_cache_are_taken_as_stored(copy: Path, names: tuple[str, str]) -> None:
    stored = {
        f"{LAYER}.self_attn.{name}": torch.tensor(value) for name, value in zip(names, (0.3, 0.7), strict=True)
    }
    edit(copy, lambda tensors: tensors.update(stored))
    model = load(copy, fp8_kv=True)
    assert model.kv_cache_dtype == torch.float8_e4m3fn
    scales = model.decoder.layers[1].self_attn.kv_scales
    assert scales is not None
    torch.testing.assert_close(scales, torch.tensor([[0.3, 0.3], [0.7, 0.7]]))
    bound = model.decoder.layers[0].self_attn.kv_scales
    assert bound is not None
    assert torch.equal(bound.log2(), bound.log2().round()), "a layer without them gets bounds"
    assert load(copy).decoder.layers[1].self_attn.kv_scales is None


def test_ranks_share_no_checkpoint_of_fewer_bits(copy: Path, gqa_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--tensor-parallel-size 2: .* is quantised by awq, .* one rank only"):
        load(copy, shard=Shard(1, 2))
    dense = Path(shutil.copytree(gqa_folder, tmp_path / "dense"))
    edit(dense, lambda tensors: tensors.update({f"{LAYER}.self_attn.k_scale": torch.tensor(0.3)}))
    with pytest.raises(
        ConfigError, match=r"--tensor-parallel-size 2: .* has scales of a KV cache, .* one rank only"
    ):
        load(dense, shard=Shard(0, 2))


@pytest.mark.parametrize("stored", [
    {"k_scale": 0.3},
    {"k_scale": 0.3, "v_scale": -1.0},
    {"k_scale": 0.3, "v_scale": float("nan")},
    {"k_scale": 0.3, "k_proj.k_scale": 0.3, "v_scale": 0.3},
], ids=str)  # fmt: skip
def test_scales_that_mean_nothing_are_refused(copy: Path, stored: dict[str, float]) -> None:
    named = {f"{LAYER}.self_attn.{name}": torch.tensor(value) for name, value in stored.items()}
    edit(copy, lambda tensors: tensors.update(named))
    with pytest.raises(CheckpointError, match="scale"):
        load(copy, fp8_kv=True)


@pytest.mark.parametrize(("raw", "scheme"), [
    ({}, None),
    (config_of("awq", group_size=64), QuantizationScheme("awq", 4, 64)),
    (config_of("gptq", bits=4, group_size=128), QuantizationScheme("gptq", 4, 128, 1)),
    (config_of("gptq", bits=8, group_size=-1, checkpoint_format="gptq_v2"), QuantizationScheme("gptq", 8, -1, 0)),
    (config_of("fp8", activation_scheme="static"), QuantizationScheme("fp8", 8)),
    (
        config_of("compressed-tensors", config_groups={
            "group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}, "targets": ["Linear"]}
        }),
        QuantizationScheme("fp8", 8),
    ),
], ids=str)  # fmt: skip
def test_what_config_json_says(raw: dict[str, Any], scheme: QuantizationScheme | None) -> None:
    assert parse_quantization(raw) == scheme
    assert (
        Qwen2AudioConfig.from_json({"model_type": "qwen2_audio", "quantization_config": raw}).quantization == scheme
    )


@pytest.mark.parametrize(("raw", "named"), [
    (config_of("bitsandbytes"), "quant_method"),
    (config_of("awq", bits=3), "bits"),
    (config_of("awq", version="gemv"), "version"),
    (config_of("awq", group_size=0), "group_size"),
    (config_of("gptq", bits=3, group_size=128), "bits"),
    (config_of("gptq", bits=4, group_size="all"), "group_size"),
    (config_of("gptq", bits=4, dynamic={"-:.*": {}}), "dynamic"),
    (config_of("gptq", bits=4, checkpoint_format="marlin"), "checkpoint_format"),
    (config_of("fp8", weight_block_size=[128, 128]), "weight_block_size"),
    (config_of("compressed-tensors", config_groups={"a": {"weights": {"num_bits": 4}}}), "config_groups"),
    (config_of("compressed-tensors", config_groups=[]), "config_groups"),
], ids=str)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(raw: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"quantization_config\.{named}"):
        parse_quantization(raw)
