"""The bar: which figure each line reads, and when it holds."""

from __future__ import annotations

import pytest

from benchmarks.bar import Line, evaluate, find_cell
from tests.benchmarks.documents import comparison


def test_every_line_reads_its_figure() -> None:
    lines = evaluate(comparison())
    assert [(line.figure, line.relation, line.bound) for line in lines] == [
        (pytest.approx(2.0), ">=", 1.8),
        (pytest.approx(0.375), "<=", 0.5),
        (pytest.approx(3.0), ">=", 3.0),
        (pytest.approx(1 / 6), "<=", 0.3),
        (pytest.approx(0.4), "<=", 0.5),
        (pytest.approx(0.625), "<=", 0.8),
        (pytest.approx(0.2), "<=", 0.25),
        (pytest.approx(4.5), ">=", 4.0),
        (pytest.approx(8.0), ">=", 4.0),
        (pytest.approx(5.0 / 4.3), "<=", 1.5),
        (pytest.approx(4.0), "<=", 6.0),
    ]
    assert all(line.holds for line in lines)


@pytest.mark.parametrize(
    ("at", "figure", "factor", "line"),
    [
        ((10.0, 16), "requests_per_s", 0.89, 0),
        ((10.0, 16), "ttft_s", 1.4, 1),
        ((2.0, 16), "requests_per_s", 0.99, 2),
        ((2.0, 16), "ttft_s", 1.9, 3),
        ((10.0, 1), "ttft_s", 1.3, 4),
        ((10.0, 1), "time_per_output_token_s", 1.29, 5),
    ],
)
def test_a_worse_ratio_fails_its_line_alone(at: tuple[float, int], figure: str, factor: float, line: int) -> None:
    document = comparison()
    find_cell(document, *at)["ratio"][figure] *= factor
    assert [number for number, one in enumerate(evaluate(document)) if not one.holds] == [line]


def test_without_the_peer_its_lines_are_not_measured() -> None:
    document = comparison()
    del document["servers"]["vllm"]
    for cell in document["cells"]:
        del cell["vllm"], cell["ratio"]
    assert [line.holds for line in evaluate(document)] == [None] * 7 + [True] * 4


@pytest.mark.parametrize(
    ("line", "verdict"),
    [
        (Line("speed", 2.0, ">=", 1.8), "holds"),
        (Line("speed", 1.7, ">=", 1.8), "FAILS"),
        (Line("speed", None, ">=", 1.8), "not measured"),
        (Line("time", 1.8, "<=", 1.8), "holds"),
        (Line("time", 1.9, "<=", 1.8), "FAILS"),
    ],
)
def test_a_line_prints_its_verdict(line: Line, verdict: str) -> None:
    assert str(line).startswith(verdict)
    assert line.as_row()["holds"] == {"holds": True, "FAILS": False, "not measured": None}[verdict]
