"""The comparison: turns, ratios, and one real server driven as the peers are."""

from __future__ import annotations

import sys

import psutil
import pytest

from benchmarks.compare import FIGURES, compare_cell, drive, visits
from benchmarks.make_checkpoint import BUNDLED
from benchmarks.servers import Recipe, running, tympan


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
    with running(recipe) as server:
        with server.peak_memory() as peak:
            run = drive(server, (0.5, 2), requests=4, tokens=5, seed=7)
        with pytest.raises(RuntimeError, match="2 of 2 requests failed"):
            drive(server, (0.001, 1), requests=2, tokens=5, seed=7)
        processes = psutil.Process().children(recursive=True)
        cpu_s = server.cpu_seconds()
    assert 0 < run["ttft_s"] < run["wall_s"]
    assert run["requests_per_s"] * run["wall_s"] == pytest.approx(4)
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
