"""`tympan bench`: what it makes of figures, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from tympan.cli import bench
from tympan.cli.main import app
from tympan.load import LoadPlan, Outcome, summarise

URL = "http://127.0.0.1:9"
RUNNER = CliRunner()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[LoadPlan]:
    """What was to be measured; the last of three requests fails."""
    plans: list[LoadPlan] = []

    async def measure(plan: LoadPlan, on_done: Any) -> dict[str, Any]:
        plans.append(plan)
        outcomes = [Outcome(10.0, ttft=0.25, end_to_end=1.0, gaps=[0.05], num_tokens=4) for _ in range(2)]
        outcomes.append(Outcome(10.0, error="HTTP 500: it broke"))
        for outcome in outcomes:
            on_done(outcome)
        return summarise(plan, "tiny", outcomes, 2.0)

    monkeypatch.setattr(bench, "measure", measure)
    return plans


def test_figures_are_tables_or_json(asked: list[LoadPlan], tmp_path: Path) -> None:
    kept = tmp_path / "figures.json"
    arguments = ["bench", "--url", URL, "--api-key", "k", "--requests", "3", "--rate", "2", "--output", str(kept)]
    shown = RUNNER.invoke(app, arguments)
    assert shown.exit_code == 1  # as one request failed
    rows = {" ".join(line.split()) for line in shown.stdout.splitlines()}
    assert {
        "requests 3, of which 1 failed",
        "requests/s 1.00",
        "time to first token 250.0 250.0 250.0 250.0",
    } <= rows
    assert shown.stderr == "tympan: HTTP 500: it broke\n"
    [plan] = asked
    assert (plan.url, plan.api_key, plan.requests, plan.rate) == (f"{URL}/v1", "k", 3, 2.0)
    assert json.loads(kept.read_text())["ttft_s"]["p50"] == 0.25
    again = RUNNER.invoke(app, arguments)
    assert (again.exit_code, len(asked)) == (1, 1)
    assert "exists: name another file by --output" in again.stderr
    printed = RUNNER.invoke(app, ["bench", "--url", URL, "--json"])
    assert json.loads(printed.stdout)["url"] == f"{URL}/v1"


def test_nobody_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    async def measure(*_: object) -> dict[str, Any]:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(bench, "measure", measure)
    ended = RUNNER.invoke(app, ["bench", "--url", URL])
    assert ended.exit_code == 1
    assert ended.stderr.startswith(f"tympan: nobody answers at {URL}/v1: ")
