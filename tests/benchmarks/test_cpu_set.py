"""The set: its table fits the machine and the quarter of an hour, and no part holds up the others."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from benchmarks import cpu_set
from benchmarks.cpu_set import BUDGET_S, PARTS, Part, run_part


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_parts_are_modules_that_take_an_output(part: Part) -> None:
    module, *words = f"benchmarks.{part.command}".split()
    assert importlib.util.find_spec(module) is not None
    words = list(itertools.takewhile(lambda word: not word.startswith("--"), words))  # sub-commands
    told = subprocess.run(
        [sys.executable, "-m", module, *words, "--help"], capture_output=True, text=True, timeout=120
    )
    assert "--output" in told.stdout


def test_all_parts_together_stay_below_the_budget() -> None:
    assert sum(part.limit_s for part in PARTS) <= BUDGET_S
    assert len({part.name for part in PARTS}) == len(PARTS)


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose `benchmarks` package is the test's own."""
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(cpu_set, "ROOT", tmp_path)
    return tmp_path


def write(scripts: Path, source: str) -> Part:
    (scripts / "benchmarks" / "one.py").write_text(source)
    return Part("one", "one --size small", limit_s=2)


def test_a_part_is_run_with_its_arguments_and_tells_what_it_skipped(scripts: Path) -> None:
    source = "import json, sys; json.dump({'skipped': sys.argv[1:4]}, open(sys.argv[-1], 'w'))"
    row = run_part(write(scripts, source), Path("one.json"), ["--extra"])
    assert (row["outcome"], row["skipped"]) == ("done", ["--size", "small", "--extra"])
    assert json.loads((scripts / "one.json").read_text())


def test_a_part_that_fails_leaves_no_result_of_an_older_run(scripts: Path) -> None:
    (scripts / "one.json").write_text("{}")
    assert run_part(write(scripts, "raise SystemExit(3)"), Path("one.json"), [])["outcome"] == "failed"
    assert not (scripts / "one.json").exists()
    assert run_part(write(scripts, "pass"), Path("one.json"), [])["outcome"] == "failed"


def test_a_part_that_takes_too_long_is_ended_with_what_it_started(scripts: Path) -> None:
    child = f"import time; time.sleep(600)  # {uuid.uuid4()}"  # nobody else's on this machine
    source = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}], "
    source += "start_new_session=True); time.sleep(600)"
    started = time.perf_counter()
    row = run_part(write(scripts, source), Path("one.json"), [])
    assert row["outcome"] == "out of time"
    assert 2 <= row["took_s"] < 60
    assert time.perf_counter() - started < 60
    left = [process for process in psutil.process_iter(["cmdline"]) if child in (process.info["cmdline"] or ())]
    assert not psutil.wait_procs(left, timeout=30)[1]  # a kill takes a moment on a busy machine
