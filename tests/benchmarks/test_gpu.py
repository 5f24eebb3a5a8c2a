"""The GPU benchmarks without a GPU: the whole pipeline at a tiny size, cells that fail, the bar, the page."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import bar, page, timing, variants, worker
from benchmarks.gpu.driver import Document, run_all
from benchmarks.gpu.floors import H200, decode_step_s, encoder_flop, kv_bytes_per_token
from benchmarks.gpu.journal import BEGIN_ANEW, Journal, Unavailable, is_poisoned, read_cells
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.table import EMPTY, render

ROOT = Path(__file__).resolve().parent.parent.parent


NEEDS_TRITON = {"fused", "variants"}
"""Parts that may have no figure on a CPU."""


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_a_part_runs_at_a_tiny_size_on_a_cpu(part: Part, tmp_path: Path) -> None:
    path = tmp_path / "cells"
    worker.main([part.name, str(path), "tiny", "cpu"])
    cells = read_cells(path)
    assert not [cell for cell in cells if "error" in cell]
    rows = {cell["cell"]: cell["row"] for cell in cells if "row" in cell}
    skipped = [cell for cell in cells if "skipped" in cell]
    assert all(cell["skipped"] for cell in skipped)
    assert rows or part.name in NEEDS_TRITON
    tiny = SHAPES["tiny"]
    if part.name == "steps":
        assert all(rows[f"default, batch {batch}"]["ms"] > 0 for batch in tiny.batches)
        assert rows["default, batch 4"]["context"] == pytest.approx(tiny.context, abs=4)
    if part.name == "kernels":
        assert rows["reference decode 4"]["error"] == 0.0
        assert 0 < rows["cpu decode 4"]["error"] < 0.02
    if part.name == "http":
        assert rows[f"idle, {tiny.clip_seconds[-1]:g} s clip"]["ttft_s"]["p50"] > 0
    if part.name in ("offline", "transformers"):
        assert {row["prompt_tokens"] for row in rows.values() if "wall_s" in row} == {tiny.prompt_tokens}


def test_the_command_runs_parts_within_its_time(tmp_path: Path) -> None:
    out = tmp_path / "all.json"
    words = [sys.executable, "-m", "benchmarks.gpu", "all", "--tiny", "--device", "cpu", "--out", str(out)]
    done = subprocess.run([*words, "--seconds", "12"], cwd=ROOT, capture_output=True, text=True, timeout=280)
    document = json.loads(out.read_text())
    assert list(document["parts"]) == [part.name for part in PARTS], done.stderr
    assert document["parts"]["ceilings"]["cells"]
    assert document["parts"]["ablations"]["outcome"].startswith("not begun")
    assert done.returncode == 1
    assert done.stdout.count("not measured") == len(document["bar"])
    assert document["hardware"]["gpu"] is None or torch.cuda.is_available()


@pytest.mark.parametrize("words", [("steps",), ("all", "--plan")], ids=" ".join)
def test_a_gpu_that_is_not_there_is_said_at_once(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By the first line of `make gpu` too."""
    monkeypatch.setattr(command, "machine", lambda: {"hardware": {"gpu": None}})
    monkeypatch.setattr(sys, "argv", ["gpu", *words, "--out", str(tmp_path / "all.json")])
    with pytest.raises(SystemExit, match="--tiny --device cpu"):
        command.main()
    assert not list(tmp_path.iterdir())


def test_what_it_will_take_is_said_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "machine", lambda: {"hardware": {"gpu": "NVIDIA H200"}})
    for words, minutes in ((("all", "--seconds", "900"), "15 minutes"), (("steps", "http"), "8 minutes")):
        monkeypatch.setattr(sys, "argv", ["gpu", *words, "--plan"])
        assert command.main() == 0
        told = capsys.readouterr().out
        assert f"on NVIDIA H200, {minutes} at most" in told
        wanted = PARTS if words[0] == "all" else [part for part in PARTS if part.name in words]
        assert [line.split()[2] for line in told.splitlines()[1:-1]] == [part.name for part in wanted]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert makefile.index("benchmarks.gpu all --plan") < makefile.index("pytest -m gpu")


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_a_part_is_a_function_and_the_page_has_it(part: Part) -> None:
    module, function = part.function.split(".")
    assert callable(getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function))
    assert f"| `{part.name}` |" in page.PAGE.read_text(encoding="utf-8")
    assert f"| {part.limit_s:g} s |" in page.PAGE.read_text(encoding="utf-8")


class TestJournal:
    def test_a_cell_that_raises_is_told_and_the_next_goes_on(self, tmp_path: Path) -> None:
        journal = Journal(tmp_path / "cells")
        journal.cell("broken", lambda: {"x": 1 // 0})
        journal.cell("absent", lambda: _raise(Unavailable("no such thing")))
        assert journal.cell("whole", lambda: {"x": 1}) == {"x": 1}
        broken, absent, whole = read_cells(tmp_path / "cells")
        assert broken["error"].startswith("ZeroDivisionError")
        assert "test_gpu.py" in broken["error"]
        assert absent == {"cell": "absent", "skipped": "no such thing"}
        assert whole["row"] == {"x": 1}

    def test_what_is_settled_is_not_run_again(self, tmp_path: Path) -> None:
        path = tmp_path / "cells"
        Journal(path).cell("one", lambda: {"x": 1})
        Journal(path).cell("two", lambda: _raise(ValueError("no")))
        path.write_text(path.read_text() + json.dumps({"cell": "three", "began": 0}) + '\n{"cell": "fo')
        again = Journal(path)
        assert not again.lacks(["one", "two", "three"])
        assert again.lacks(["one", "four"])
        for name in ("one", "two", "three"):
            assert again.cell(name, lambda: _raise(AssertionError("it ran"))) is None
        assert "ended, in this cell" in read_cells(path)[2]["error"]

    def test_what_cells_need_is_made_again_unless_that_failed(self, tmp_path: Path) -> None:
        path = tmp_path / "cells"
        made = [Journal(path).attempt("engine", lambda: 7, lambda engine: {"size": engine}) for _ in range(2)]
        assert made == [7, 7]
        assert Journal(path).attempt("other", lambda: 1 // 0, lambda _: {}) is None
        assert Journal(path).attempt("other", lambda: 7, lambda _: {}) is None
        assert [cell["cell"] for cell in read_cells(path)] == ["engine", "other"]

    def test_a_lost_device_ends_the_process(self, tmp_path: Path) -> None:
        error = RuntimeError("CUDA error: an illegal memory access was encountered")
        with pytest.raises(SystemExit) as caught:
            Journal(tmp_path / "cells").cell("one", lambda: _raise(error))
        assert caught.value.code == BEGIN_ANEW
        assert "illegal memory access" in read_cells(tmp_path / "cells")[0]["error"]
        assert not is_poisoned(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
        assert not is_poisoned(ValueError("no"))


def _raise(error: Exception) -> Any:
    raise error


CHILD = """
import json, os, sys, time
from pathlib import Path
from benchmarks.gpu.journal import Journal
journal = Journal(Path(sys.argv[1]))
def hang(): time.sleep(600)
def die(): os._exit(9)
for name in sys.argv[2:]:
    journal.cell(name, {"hang": hang, "die": die}.get(name, lambda: {"value": name}))
"""


class TestDriver:
    """Parts are scripts of the test's own: names of cells, some of which hang or die."""

    def drive(self, out: Path, cells: dict[str, list[str]], *, limit: float = 60, seconds: float = 60) -> Document:
        parts = [Part(name, "", limit, 2.5, "") for name in cells]
        document = Document(out, {"shape": "tiny", "device": "cpu"}, lambda content: {**content, "bar": []})
        document.resume()
        run_all(
            parts,
            document,
            lambda part, journal: [sys.executable, "-c", CHILD, str(journal), *cells[part.name]],
            seconds,
        )
        return document

    def test_what_dies_or_hangs_is_passed_over(self, tmp_path: Path) -> None:
        out = tmp_path / "out.json"
        self.drive(out, {"first": ["a", "die", "b", "hang", "c"], "second": ["d"]})
        parts = json.loads(out.read_text())["parts"]
        assert [part["outcome"] for part in parts.values()] == ["done", "done"]
        kinds = [(cell["cell"], "row" in cell) for cell in parts["first"]["cells"]]
        assert kinds == [("a", True), ("die", False), ("b", True), ("hang", False), ("c", True)]

    def test_time_that_is_up_costs_only_what_was_not_measured(self, tmp_path: Path) -> None:
        out = tmp_path / "out.json"
        started = time.monotonic()
        self.drive(out, {"first": ["a", "hang", "b"], "second": ["c"]}, seconds=2.4)
        assert time.monotonic() - started < 20
        parts = json.loads(out.read_text())["parts"]
        assert parts["first"]["outcome"] == "out of time"
        assert parts["first"]["cells"][0]["row"] == {"value": "a"}
        assert parts["second"]["outcome"].startswith("not begun")
        self.drive(out, {"first": ["a", "hang2", "b"], "second": ["c"]})
        parts = json.loads(out.read_text())["parts"]
        assert [part["outcome"] for part in parts.values()] == ["done", "done"]
        assert [cell["cell"] for cell in parts["first"]["cells"]] == ["a", "hang2", "b"]

    def test_figures_of_another_shape_are_not_gone_on_with(self, tmp_path: Path) -> None:
        out = tmp_path / "out.json"
        out.write_text(json.dumps({"shape": "7b", "device": "cuda", "parts": {"first": {"cells": []}}}))
        assert list(self.drive(out, {"second": ["a"]}).content["parts"]) == ["second"]


def cell(name: str, **row: Any) -> dict[str, Any]:
    return {"cell": name, "row": row}


def measured() -> dict[str, Any]:
    """A document of made-up figures, by which every line of the bar holds."""
    floors = {1: 3.43, 8: 4.28, 32: 7.21, 64: 11.11, 128: 18.92}
    return copy.deepcopy(
        {
            "shape": "7b",
            "device": "cuda",
            "date": "2026-11-24T12:00:00+00:00",
            "hardware": {"gpu": "NVIDIA H200"},
            "versions": {"torch": "2.11.0", "python": "3.12.3"},
            "parts": {
                "ceilings": {
                    "cells": [cell("copy", bytes_per_s=4.1e12), cell("gemm square", flop_per_s=7.0e14)],
                },
                "steps": {
                    "cells": [
                        *(cell(f"default, batch {b}", ms=1.2 * ms, context=1000) for b, ms in floors.items()),
                        cell("fp8 KV, batch 64", ms=9.0, context=1000),
                    ]
                },
                "http": {
                    "cells": [
                        cell("idle, 30 s clip", ttft_s={"p50": 0.040, "p99": 0.05}),
                        cell("idle, 2 s clip", ttft_s={"p50": 0.015, "p99": 0.02}),
                    ]
                },
                "offline": {
                    "cells": [cell("128 at once", requests_per_s=12.0), {"cell": "192 at once", "error": "x"}]
                },
                "transformers": {
                    "cells": [cell("batch 8", requests_per_s=0.9), cell("batch 32", requests_per_s=1.25)],
                },
                "kernels": {
                    "cells": [
                        cell("triton", block_sizes=[16]),
                        cell("triton decode 64", us=250.0, bytes_per_s=4.1e12, error=0.004),
                        {"cell": "flash_attn", "skipped": "not installed"},
                    ]
                },
            },
        }
    )


class TestBar:
    def test_every_line_reads_its_figure(self) -> None:
        lines = bar.evaluate(measured())
        assert [line.figure for line in lines] == pytest.approx(
            [*[1.2] * 5, 1.2 * 11.11 / 9.0, 0.040, 0.015, 12.0, 12.0 / 1.25], rel=2e-3
        )
        assert all(line.holds for line in lines)

    @pytest.mark.parametrize(("part", "number", "name", "factor", "lines"), [
        ("steps", 0, "ms", 1.1, [0]),
        ("steps", 3, "ms", 1.1, [3]),
        ("steps", 5, "ms", 1.1, [5]),
        ("offline", 0, "requests_per_s", 0.8, [8, 9]),
        ("transformers", 1, "requests_per_s", 1.3, [9]),
    ])  # fmt: skip
    def test_a_worse_figure_fails_its_lines_alone(
        self, part: str, number: int, name: str, factor: float, lines: list[int]
    ) -> None:
        document = measured()
        document["parts"][part]["cells"][number]["row"][name] *= factor
        assert [place for place, line in enumerate(bar.evaluate(document)) if not line.holds] == lines

    def test_a_slow_first_token_fails(self) -> None:
        document = measured()
        document["parts"]["http"]["cells"][0]["row"]["ttft_s"]["p50"] = 0.046
        assert [place for place, line in enumerate(bar.evaluate(document)) if not line.holds] == [6]

    def test_without_figures_the_commands_stand_there(self) -> None:
        document = measured()
        del document["parts"]["http"], document["parts"]["steps"]
        lines = bar.evaluate(document)
        assert [line.holds for line in lines] == [None] * 8 + [True, True]
        assert "python -m benchmarks.gpu http" in str(lines[6])
        assert bar.add_to(document)["bar"][0]["command"] == "python -m benchmarks.gpu ceilings steps"

    @pytest.mark.parametrize("change", [{"shape": "tiny"}, {"device": "cpu"}, {"parts": {}}])
    def test_figures_of_another_size_never_count(self, change: dict[str, Any]) -> None:
        assert {line.figure for line in bar.evaluate({**measured(), **change})} == {None}

    def test_another_gpu_is_held_against_its_own_ceilings(self) -> None:
        document = {**measured(), "hardware": {"gpu": "NVIDIA H100"}}
        document["parts"]["ceilings"]["cells"][0]["row"]["bytes_per_s"] = 0.5 * H200.bytes_per_s
        assert bar.evaluate(document)[0].figure == pytest.approx(0.6, rel=2e-3)
        del document["parts"]["ceilings"]
        assert bar.evaluate(document)[0].figure is None
        assert bar.add_to(document)["floors"] is None

    def test_a_context_that_was_longer_raises_the_floor(self) -> None:
        document = measured()
        document["parts"]["steps"]["cells"][4]["row"]["context"] = 1100
        assert bar.evaluate(document)[4].figure < 1.2 * 0.93


def test_floors_are_those_that_the_bar_was_set_by() -> None:
    config = SHAPES["7b"].config
    steps = [1000 * decode_step_s(config, batch, 1000, H200) for batch in SHAPES["7b"].batches]
    assert steps == pytest.approx([3.43, 4.29, 7.21, 11.1, 18.9], rel=2e-3)
    small = {"kv_itemsize": 1}
    assert 1000 * decode_step_s(config, 64, 1000, H200, **small) == pytest.approx(7.21, rel=2e-3)
    assert 1000 * decode_step_s(config, 1, 1000, H200, weight_bytes=1) == pytest.approx(1.78, rel=0.1)
    assert kv_bytes_per_token(config.text) == 512 << 10
    assert encoder_flop(config.audio, config.text.hidden_size, 3000) == pytest.approx(2.28e12, rel=0.02)


class TestPage:
    def test_what_is_committed_is_what_was_measured(self) -> None:
        text = page.PAGE.read_text(encoding="utf-8")
        assert page.with_figures(text, page.read(page.DOCUMENT)) == text

    def test_nothing_measured_is_said_and_nothing_is_made_up(self) -> None:
        text = render(EMPTY)
        assert "Nothing here has been measured yet" in text
        assert text.count("`python -m benchmarks.gpu") >= len(bar.evaluate(EMPTY))
        assert "holds |" not in text
        assert "11.11" in text  # a floor

    def test_figures_stand_in_their_tables(self) -> None:
        document = measured()
        document["parts"]["steps"]["cells"][2]["row"]["ms"] = 9.87
        text = render(document)
        assert "NVIDIA H200, torch 2.11.0" in text
        assert "| 32 | 7.21 | 9.87 | unmeasured |" in text
        assert "| triton decode 64 | 250.0 | 4,100 GB/s | 100% | 4.0e-03 |" in text
        assert "**missed**" in text
        assert "Unmeasured: `python -m benchmarks.gpu memory`" in text

    @pytest.mark.parametrize("document", [EMPTY, measured()], ids=["nothing", "measured"])
    def test_the_picture_has_a_bar_for_what_was_measured(self, document: dict[str, Any]) -> None:
        axes = page.draw(document).axes[0]
        batches = len(SHAPES["7b"].batches)
        assert len(axes.patches) == (batches if document is EMPTY else 2 * batches)
        assert sum(text.get_text() == "unmeasured" for text in axes.texts) == (batches if document is EMPTY else 0)

    def test_a_document_of_a_cpu_is_no_document_of_a_gpu(self, tmp_path: Path) -> None:
        path = tmp_path / "all.json"
        path.write_text(json.dumps({**measured(), "device": "cpu"}))
        assert page.read(path) is EMPTY


class FakeEvent:
    """The device's clock advances by a millisecond with each call, a tenth of that in a graph."""

    now = 0.0

    def __init__(self, **_: object) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = FakeEvent.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.at - self.at


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """As much of torch.cuda as timing needs. `refuses`: what a capture raises."""
    fake = SimpleNamespace(refuses=None, captured=0)

    class Graph:
        def replay(self) -> None:
            FakeEvent.now += 0.1 * fake.captured

    class Capture:
        def __init__(self, graph: Graph) -> None:
            pass

        def __enter__(self) -> None:
            self.before = FakeEvent.now

        def __exit__(self, *_: object) -> None:
            fake.captured = round(FakeEvent.now - self.before)
            if fake.refuses:
                raise fake.refuses

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    return fake


def spend_a_millisecond() -> None:
    FakeEvent.now += 1.0


def test_a_call_is_timed_launched_and_replayed(cuda: SimpleNamespace) -> None:
    device = torch.device("cuda")
    taken = timing.time_calls([spend_a_millisecond] * 4, device)
    assert taken.launched == pytest.approx(1e-3)
    assert taken.replayed == pytest.approx(1e-4)
    assert taken.best == taken.replayed
    eager = timing.time_calls([spend_a_millisecond], device, capture=False)
    assert (eager.replayed, eager.best) == (None, pytest.approx(1e-3))
    cuda.refuses = RuntimeError("operation not permitted when stream is capturing")
    refused = timing.time_calls([spend_a_millisecond], device)
    assert refused.best == pytest.approx(1e-3)
    assert "not permitted" in str(refused.note)
    assert timing.num_copies(16 << 20, device) * (16 << 20) >= timing.CACHE_BYTES


def test_knobs_are_put_back() -> None:
    module = SimpleNamespace(num_shares=lambda *_: 1)
    kept = module.num_shares
    with variants.changed(module, num_shares=lambda *_: 8):
        assert module.num_shares() == 8
    assert module.num_shares is kept

    def break_off() -> None:
        with variants.changed(module, num_shares=lambda *_: 8):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    assert module.num_shares is kept
