"""The accuracy script on the bundled checkpoint: what changes nothing measures nothing, what breaks it shows."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from benchmarks.accuracy import BUNDLED, measure, table
from model.loader import LM_HEAD
from model.weight_files import SINGLE_FILE


def run(**changes: Any) -> dict[str, dict[str, float]]:
    """-> figures by variant."""
    defaults = {"model": BUNDLED, "dtype": "float32", "device": "cpu", "prompts": 2, "max_tokens": 8}
    results: dict[str, dict[str, float]] = measure(argparse.Namespace(**defaults, **changes))["results"]
    return results


def test_a_copy_differs_by_nothing_and_an_upset_one_by_much(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(BUNDLED, tmp_path / "copy"))
    upset = Path(shutil.copytree(BUNDLED, tmp_path / "upset"))
    tensors = load_file(upset / SINGLE_FILE)
    tensors[LM_HEAD] = tensors[LM_HEAD].flip(0).contiguous()
    save_file(tensors, upset / SINGLE_FILE)
    results = run(variants=[], checkpoint=[("copy", copy), ("upset", upset)])
    assert results["copy"]["largest_kl"] == results["copy"]["largest_logit_error"] == 0.0
    assert results["copy"]["same_next_token"] == results["copy"]["same_answer"] == 1.0
    assert results["upset"]["mean_kl"] > 1.0
    assert results["upset"]["same_next_token"] < 0.5
    assert results["upset"]["same_answer"] == 0.0


def test_every_kind_of_fewer_bits_costs_a_little() -> None:
    results = run(variants=["fp8_kv", "fp8", "int8"], checkpoint=[])
    for name, figures in results.items():
        assert 0.0 < figures["mean_kl"] < 1e-3, name
        assert figures["mean_kl"] <= figures["p99_kl"] <= figures["largest_kl"]
        assert figures["same_answer"] == 1.0, name
        assert name in table(results)
