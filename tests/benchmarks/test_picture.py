"""The picture shows what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.picture import draw, series
from tests.benchmarks.documents import comparison


def test_series_hold_each_system_that_was_measured() -> None:
    document = comparison()
    assert series(document, "requests_per_s", 10.0) == {
        "tympan": [(1, 3.0), (16, 6.0)],
        "vllm": [(1, 1.5), (16, 3.0)],
        "transformers": [(1, 1.0), (16, 1.0)],
    }
    assert series(document, "ttft_s", 2.0)["transformers"] == [(1, 2.0), (16, 32.0)]
    for cell in document["cells"]:
        del cell["vllm"]
    assert set(series(document, "ttft_s", 2.0)) == {"tympan", "transformers"}


def test_panels_draw_the_series() -> None:
    figure = draw(comparison())
    panels = figure.axes
    assert [axes.get_title() for axes in panels] == ["clips of 2 s", "clips of 10 s"] * 2
    ours = {line.get_label(): list(line.get_ydata()) for line in panels[3].get_lines()}
    assert ours == {"Tympan": [3.0, 6.0], "vLLM (CPU)": [1.5, 3.0], "transformers, static batch": [1.0, 1.0]}
    assert list(panels[0].get_lines()[1].get_ydata()) == [0.2, 3.0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(ours)


def test_the_program_writes_a_small_picture(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(comparison()))
    words = ["-m", "benchmarks.picture", str(tmp_path / "a.json"), str(tmp_path / "images" / "a.png")]
    subprocess.run([sys.executable, *words], check=True, timeout=120)
    data = (tmp_path / "images" / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert 5_000 < len(data) < 150_000
