"""Random weights: the shape of a checkpoint, the same every time, and answers that a stream can show."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from engine.core import EngineCore
from engine.messages import EngineArgs
from model import checkpoint
from model.attention import select_backend
from model.config import GenerationConfig, Qwen2AudioConfig
from model.dummy import load_dummy
from model.loader import load_model
from model.qwen2_audio import Qwen2Audio
from tests.reference import Prompt, noise

CPU = torch.device("cpu")


@pytest.fixture
def folder(gqa_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint without its weights."""
    return Path(shutil.copytree(gqa_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")))


def make(folder: Path) -> Qwen2Audio:
    backend, _ = select_backend("reference", CPU)
    return load_dummy(folder, Qwen2AudioConfig.from_folder(folder), backend, torch.bfloat16, CPU)


def test_every_parameter_is_filled_and_the_same_each_time(folder: Path, gqa_folder: Path) -> None:
    model, again = make(folder), dict(make(folder).named_parameters())
    real = load_model(gqa_folder, model.config, model.backend, torch.bfloat16, CPU)
    shapes = {name: parameter.shape for name, parameter in real.named_parameters()}
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again[name]), name
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif "norm" in name:
            assert (parameter == 0).all(), name
        else:
            assert parameter.float().std().item() == pytest.approx(0.02, rel=0.5) or name == "lm_head.weight"
            assert (parameter != 0).float().mean().item() > 0.99, name


def test_an_engine_answers_with_text(folder: Path) -> None:
    core = EngineCore.build(
        EngineArgs(str(folder), load_format="dummy", device="cpu", num_threads=1, max_model_len=256)
    )
    ends = GenerationConfig.from_folder(folder).eos_token_ids
    first_special = min(core.runner.model.config.audio_token_id, *ends)
    core.add_request(Prompt.of(3, noise(9000, 1), 4, 5).request("r", max_tokens=12))
    tokens = [token for _ in range(14) for output in core.step() for token in output.new_token_ids]
    assert len(tokens) == 12
    assert max(tokens) < first_special


def test_nothing_but_small_files_is_downloaded_for_it(monkeypatch: pytest.MonkeyPatch, gqa_folder: Path) -> None:
    asked: list[list[str]] = []

    def download(*_: object, allow_patterns: list[str], **__: object) -> str:
        asked.append(allow_patterns)
        return str(gqa_folder)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    checkpoint.resolve_checkpoint("owner/name")
    checkpoint.resolve_checkpoint("owner/name", with_weights=False)
    assert ["*.safetensors" in patterns for patterns in asked] == [True, False]
