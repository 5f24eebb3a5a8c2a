"""Loading safetensors: every tensor exactly once, or an error that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model.attention import select_backend
from model.config import Qwen2AudioConfig
from model.errors import CheckpointError
from model.loader import LM_HEAD, load_model, name_table
from model.qwen2_audio import Qwen2Audio
from model.weight_files import INDEX_FILE, SINGLE_FILE
from tests.reference import build

EMBED = "language_model.model.embed_tokens.weight"
NORM = "language_model.model.norm.weight"


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Qwen2Audio:
    backend, _ = select_backend("reference", torch.device("cpu"))
    return load_model(folder, Qwen2AudioConfig.from_folder(folder), backend, dtype, torch.device("cpu"), **options)


@pytest.fixture
def copy(gqa_folder: Path, tmp_path: Path) -> Path:
    """A single-file checkpoint that a test may spoil."""
    return Path(shutil.copytree(gqa_folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def sharded_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("sharded"), max_shard_size="1MB")


@pytest.fixture
def sharded(sharded_original: Path, tmp_path: Path) -> Path:
    """A checkpoint of several shards that a test may spoil."""
    return Path(shutil.copytree(sharded_original, tmp_path / "sharded"))


def test_code_that_a_checkpoint_brings_is_not_run(copy: Path) -> None:
    """As trust_remote_code would: CVE-2025-66448, CVE-2026-22807, CVE-2026-27893."""
    (copy / "evil.py").write_text(f"open({str(copy / 'ran')!r}, 'w')\nclass Evil: ...\n")
    auto_map = dict.fromkeys(("AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer"), "evil.Evil")
    for file in copy.glob("*.json"):
        content = json.loads(file.read_text())
        if isinstance(content, dict) and file.name != INDEX_FILE:
            file.write_text(json.dumps(content | {"auto_map": auto_map}))
    load(copy)
    assert not (copy / "ran").exists()


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], file: str = SINGLE_FILE) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index["weight_map"])
    (folder / INDEX_FILE).write_text(json.dumps(index))


@pytest.mark.parametrize("folder", ["gqa_folder", "mha_folder"])
def test_the_name_table_is_what_transformers_writes(folder: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(folder)
    with safe_open(path / SINGLE_FILE, framework="pt") as file:
        assert set(name_table(Qwen2AudioConfig.from_folder(path))) == set(file.keys())


def test_every_published_value_reaches_its_place(gqa_folder: Path) -> None:
    model = load(gqa_folder)
    parameters = dict(model.named_parameters())
    table = name_table(model.config)
    covered = {name: torch.zeros(parameter.shape[0], dtype=torch.int) for name, parameter in parameters.items()}
    for name, tensor in load_file(gqa_folder / SINGLE_FILE).items():
        target = table[name]
        rows = slice(None) if target.rows is None else slice(target.start, target.start + target.rows)
        assert torch.equal(parameters[target.parameter][rows], tensor), name
        covered[target.parameter][rows] += 1
    for name, counts in covered.items():
        if name.startswith("audio_tower.") and name.endswith(".qkv_proj.bias"):
            assert counts.sum() == len(counts) * 2 // 3  # k has no bias
            assert not parameters[name][counts == 0].any()
        else:
            assert counts.eq(1).all(), name


def test_shards_load_as_the_single_file_does(sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2
    merged = {}
    for file in sharded.glob("*.safetensors"):
        merged |= load_file(file)
    ours = load(sharded)
    for name, target in name_table(ours.config).items():
        if target.rows is None:
            assert torch.equal(dict(ours.named_parameters())[target.parameter], merged[name])


def test_progress_ends_at_the_number_of_tensors(gqa_folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = load(gqa_folder, progress=lambda done, total: seen.append((done, total)))
    total = len(name_table(model.config))
    assert seen == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_cast_to_the_asked_dtype(gqa_folder: Path, dtype: torch.dtype) -> None:
    model = load(gqa_folder, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(model.lm_head.weight, load_file(gqa_folder / SINGLE_FILE)[LM_HEAD].to(dtype))


def test_a_bfloat16_checkpoint_keeps_its_bits(tmp_path: Path) -> None:
    folder = build(tmp_path, dtype=torch.bfloat16)
    stored = load_file(folder / SINGLE_FILE)[EMBED]
    assert stored.dtype == torch.bfloat16
    assert Qwen2AudioConfig.from_folder(folder).dtype == "bfloat16"
    assert torch.equal(load(folder, torch.bfloat16).decoder.embed_tokens.weight, stored)
    assert torch.equal(load(folder, torch.float32).decoder.embed_tokens.weight, stored.float())


def test_tied_embeddings_without_lm_head_in_the_file(tmp_path: Path) -> None:
    folder = build(tmp_path, tied=True)
    edit(folder, lambda tensors: tensors.pop(LM_HEAD, None))
    stored = load_file(folder / SINGLE_FILE)
    model = load(folder)
    assert torch.equal(model.lm_head.weight, stored[EMBED])
    assert model.lm_head.weight.data_ptr() == model.decoder.embed_tokens.weight.data_ptr()


def test_an_lm_head_in_the_file_wins_over_a_tied_config(tmp_path: Path) -> None:
    folder = build(tmp_path, tied=True)
    head = torch.randn(2048, 128)
    edit(folder, lambda tensors: tensors.update({LM_HEAD: head}))
    model = load(folder)
    assert torch.equal(model.lm_head.weight, head)
    assert torch.equal(model.decoder.embed_tokens.weight, load_file(folder / SINGLE_FILE)[EMBED])


def test_a_missing_tensor_is_named(copy: Path) -> None:
    edit(copy, lambda tensors: tensors.pop(NORM))
    with pytest.raises(CheckpointError, match=f"{NORM} is missing"):
        load(copy)


def test_a_missing_lm_head_is_named_unless_tied(copy: Path) -> None:
    edit(copy, lambda tensors: tensors.pop(LM_HEAD))
    with pytest.raises(CheckpointError, match=f"{LM_HEAD} is missing"):
        load(copy)


def test_an_extra_tensor_is_named(copy: Path) -> None:
    edit(copy, lambda tensors: tensors.update({"audio_tower.layers.2.fc1.bias": torch.zeros(128)}))
    with pytest.raises(CheckpointError, match=r"audio_tower\.layers\.2\.fc1\.bias is not part of the model"):
        load(copy)


@pytest.mark.parametrize("name", [NORM, "language_model.model.layers.1.self_attn.k_proj.weight"])
def test_a_wrong_shape_is_named_with_both_shapes(copy: Path, name: str) -> None:
    wanted = list(load_file(copy / SINGLE_FILE)[name].shape)
    edit(copy, lambda tensors: tensors.update({name: torch.zeros(3, 5)}))
    with pytest.raises(CheckpointError) as caught:
        load(copy)
    assert name in str(caught.value)
    assert "[3, 5]" in str(caught.value)
    assert str(wanted) in str(caught.value)


def test_a_tensor_that_would_broadcast_is_refused(copy: Path) -> None:
    edit(copy, lambda tensors: tensors.update({NORM: torch.ones(1)}))
    with pytest.raises(CheckpointError, match=NORM):
        load(copy)


def test_a_folder_without_weights_is_named(copy: Path) -> None:
    (copy / SINGLE_FILE).unlink()
    with pytest.raises(CheckpointError, match=SINGLE_FILE):
        load(copy)


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"not safetensors at all", b"\xff" * 64])
def test_a_corrupt_file_is_named(copy: Path, content: bytes) -> None:
    (copy / SINGLE_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=SINGLE_FILE):
        load(copy)


def test_a_truncated_file_is_named(copy: Path) -> None:
    content = (copy / SINGLE_FILE).read_bytes()
    (copy / SINGLE_FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=SINGLE_FILE):
        load(copy)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        load(sharded)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=shard.name):
        load(sharded)


def test_a_tensor_in_another_shard_than_the_index_says_is_named(sharded: Path) -> None:
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))

    def move(weight_map: dict[str, str]) -> None:
        weight_map[NORM] = next(shard for shard in shards if shard != weight_map[NORM])

    edit_index(sharded, move)
    with pytest.raises(CheckpointError, match=NORM):
        load(sharded)


def test_a_tensor_stored_twice_is_named(sharded: Path) -> None:
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    weight_map = json.loads((sharded / INDEX_FILE).read_text())["weight_map"]
    other = next(shard for shard in shards if shard != weight_map[NORM])
    edit(sharded, lambda tensors: tensors.update({NORM: torch.ones(128)}), other)
    with pytest.raises(CheckpointError, match=NORM):
        load(sharded)


def test_a_tensor_missing_from_the_index_is_named(sharded: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.pop(NORM))
    with pytest.raises(CheckpointError, match=NORM):
        load(sharded)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}'])
def test_an_index_without_a_weight_map_is_named(sharded: Path, content: str) -> None:
    (sharded / INDEX_FILE).write_text(content)
    with pytest.raises(CheckpointError, match="weight_map"):
        load(sharded)


@pytest.mark.parametrize("trick", ["../{name}", "sub/{name}", "{outside}/{name}", "..", ".", ""])
def test_an_index_cannot_point_outside_its_folder(sharded: Path, tmp_path: Path, trick: str) -> None:
    weight_map = json.loads((sharded / INDEX_FILE).read_text())["weight_map"]
    shard = weight_map[NORM]
    for place in (tmp_path, sharded / "sub"):
        place.mkdir(exist_ok=True)
        shutil.copy(sharded / shard, place / shard)
    path = trick.format(name=shard, outside=tmp_path)

    def redirect(weight_map: dict[str, str]) -> None:
        weight_map.update({name: path for name, file in weight_map.items() if file == shard})

    edit_index(sharded, redirect)
    with pytest.raises(CheckpointError, match="weight_map"):
        load(sharded)
