"""The comparison: turns, ratios, and one real server driven as the peers are."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import psutil
import pytest

from benchmarks import compare
from benchmarks.compare import FIGURES, cells_of, compare_cell, drive, parse, run, visits
from benchmarks.make_checkpoint import BUNDLED
from benchmarks.picture import draw
from benchmarks.servers import Recipe, running, tympan
from tests.benchmarks.documents import comparison


def test_rounds_alternate_and_a_server_stays_up_where_it_is_next_again() -> None:
    assert visits(["ours", "peer"], 1) == [("ours", [0]), ("peer", [0])]
    assert visits(["ours", "peer"], 3) == [("ours", [0]), ("peer", [0, 1]), ("ours", [1, 2]), ("peer", [2])]
    assert visits(["ours"], 2) == [("ours", [0, 1])]


def test_a_cell_takes_medians_over_rounds_and_ratios_of_these() -> None:
    def runs(*values: float) -> list[dict[str, float]]:
        return [{**dict.fromkeys(FIGURES, value), "prompt_tokens": 299} for value in values]

    row = compare_cell((10.0, 16), 32, {"tympan": runs(6.0, 2.0, 4.0), "vllm": runs(1.0, 2.0, 9.0)})
    assert row["ratio"] == {"requests_per_s": 2.0, "ttft_s": 2.0, "time_per_output_token_s": 2.0}
    assert row["tympan"]["requests_per_s"] == 4.0
    assert [each["ttft_s"] for each in row["vllm"]["rounds"]] == [1.0, 2.0, 9.0]
    assert "ratio" not in compare_cell((10.0, 16), 32, {"tympan": runs(6.0)})


def test_our_server_is_driven_weighed_and_ended() -> None:
    recipe = tympan(BUNDLED, "float32", kv_gib=1, threads=1)
    others = set(psutil.Process().children(recursive=True))
    with running(recipe) as server:
        with server.peak_memory() as peak:
            figures = drive(server, (0.5, 2), requests=4, tokens=5, seed=7)
        with pytest.raises(RuntimeError, match="2 of 2 requests failed"):
            drive(server, (0.001, 1), requests=2, tokens=5, seed=7)
        processes = set(psutil.Process().children(recursive=True)) - others
        cpu_s = server.cpu_seconds()
    assert 0 < figures["ttft_s"] < figures["wall_s"]
    assert figures["requests_per_s"] * figures["wall_s"] == pytest.approx(4)
    assert peak.rss > 1 << 27
    assert peak.pss is None or peak.pss <= peak.rss
    assert cpu_s > 0
    assert server.ready_s > 0
    assert len(processes) >= 2  # HTTP and engine
    assert not [process for process in processes if process.is_running() and "server" in process.cmdline()]
    assert str(BUNDLED) not in recipe.shown(BUNDLED)


def test_a_server_that_cannot_start_says_why() -> None:
    recipe = Recipe("broken", (sys.executable, "-c", "raise SystemExit('no such model')"), "/ready")
    with pytest.raises(RuntimeError, match="broken did not start:\nno such model"), running(recipe):
        pass


def test_a_server_that_is_never_ready_is_ended() -> None:
    recipe = Recipe("slow", (sys.executable, "-c", "import time; time.sleep(600)"), "/ready")
    before = psutil.Process().children()
    with pytest.raises(RuntimeError, match="slow did not start"), running(recipe, start_limit_s=0.5):
        pass
    assert psutil.Process().children() == before


@pytest.mark.parametrize("installed", ["0.32.0+cpu", None])
def test_the_document_has_every_cell_the_bar_and_what_was_skipped(
    monkeypatch: pytest.MonkeyPatch, installed: str | None
) -> None:
    def life(args: argparse.Namespace, recipe: Recipe, rounds: list[int]) -> dict[str, Any]:
        speed = 4.0 if recipe.name == "tympan" else 2.0
        run = {**dict.fromkeys(FIGURES, speed), "ttft_s": 1 / speed, "prompt_tokens": 299}
        sizes = {"pss": int(100 / speed), "rss": 200}
        memory = {"fresh": sizes, "under_load": sizes}
        return {"ready_s": speed, **memory, "runs": {cell: [run] * len(rounds) for cell in cells_of(args)}}

    rows = comparison()["offline"]
    monkeypatch.setattr(compare, "visit", life)
    monkeypatch.setattr(compare, "offline", lambda *_: rows)
    monkeypatch.setattr(compare, "write_checkpoint", lambda *_: 63_000_000)
    monkeypatch.setattr(compare, "installed_version", lambda _: installed)
    document = run(parse(["--rounds", "2"]))
    assert [(cell["clip_seconds"], cell["concurrency"], cell["requests"]) for cell in document["cells"]] == [
        *((10.0, 1, 6), (10.0, 4, 8), (10.0, 16, 32)),
        *((2.0, 1, 6), (2.0, 4, 8), (2.0, 16, 32)),
    ]
    assert all(len(cell["tympan"]["rounds"]) == 2 for cell in document["cells"])
    holds = [line["holds"] for line in document["bar"]]
    if installed:
        assert document["servers"]["vllm"]["memory_bytes"] == 50
        assert holds == [True, True, False, False, True, False, False, True, True, False, True]
        assert document["skipped"] == []
    else:
        assert holds == [None] * 7 + [True, True, False, True]
        assert document["skipped"] == ["vllm: not installed (make peers)"]
    assert draw({**document, "date": "2026-11-24", "hardware": {"cpu": "a CPU", "cores": 2}}).axes
