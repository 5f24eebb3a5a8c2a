"""Writes the figures into docs/gpu.md and draws docs/images/gpu.png.

    python -m benchmarks.gpu.page [benchmarks/results/gpu/all.json]

Without a document, or without one of a GPU, page and picture say that nothing has been measured. Only what stands
between the page's two marks is written.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.figure import Figure

from benchmarks.gpu import bar
from benchmarks.gpu.floors import H200, decode_step_s
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.table import EMPTY, render
from benchmarks.picture import GRID, INK

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENT = ROOT / "benchmarks" / "results" / "gpu" / "all.json"
PAGE = ROOT / "docs" / "gpu.md"
PICTURE = ROOT / "docs" / "images" / "gpu.png"
BEGIN, END = "<!-- figures: python -m benchmarks.gpu.page -->\n", "<!-- end of figures -->\n"
FLOOR_COLOR, OUR_COLOR = "#b6c2cf", "#0b62d6"


def read(path: Path) -> dict[str, Any]:
    """A document, or one of nothing."""
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else EMPTY
    return document if document["device"] == "cuda" and document["shape"] == "7b" else EMPTY


def with_figures(page: str, document: dict[str, Any]) -> str:
    """The page with its middle written anew."""
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{render(document)}\n{END}{tail}"


def draw(document: dict[str, Any]) -> Figure:
    """Decode steps beside their floors, by batch."""
    shape, ceilings = SHAPES["7b"], bar.ceilings_of(document) or H200
    floors = [1000 * decode_step_s(shape.config, batch, shape.context, ceilings) for batch in shape.batches]
    steps = [bar.figure_of(document, "steps", f"default, batch {batch}", "ms") for batch in shape.batches]
    figure, axes = pyplot.subplots(figsize=(7.2, 3.6))
    places = range(len(floors))
    axes.bar([place - 0.2 for place in places], floors, 0.38, color=FLOOR_COLOR, label="floor (computed)")
    wanted = [bar.STEP_TO_FLOOR * floor for floor in floors]
    axes.hlines(
        wanted, [p - 0.4 for p in places], [p + 0.4 for p in places], color=INK, label="the bar: 1.25 floors"
    )
    measured = [(place, ms) for place, ms in zip(places, steps, strict=True) if ms is not None]
    if measured:
        axes.bar(
            [place + 0.2 for place, _ in measured], [ms for _, ms in measured], 0.38, color=OUR_COLOR, label="Tympan"
        )
    for place, ms, limit in zip(places, steps, wanted, strict=True):
        if ms is None:
            axes.text(place, limit + 0.4, "unmeasured", ha="center", color=INK, fontsize=8)
    axes.set_xticks(places, [str(batch) for batch in shape.batches])
    axes.set_xlabel("sequences, 1,000 tokens of context each")
    axes.set_ylabel("ms a decode step")
    gpu = document["hardware"]["gpu"] or "H200 (nothing measured yet)"
    axes.set_title(f"Qwen2-Audio-7B's shape, random weights, bfloat16: {gpu}", fontsize=9, color=INK)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    figure.tight_layout()
    return figure


def main(words: list[str]) -> None:
    """Command line."""
    document = read(Path(words[0]) if words else DOCUMENT)
    PAGE.write_text(with_figures(PAGE.read_text(encoding="utf-8"), document), encoding="utf-8")
    draw(document).savefig(PICTURE, dpi=110, facecolor="white")


if __name__ == "__main__":
    main(sys.argv[1:])
