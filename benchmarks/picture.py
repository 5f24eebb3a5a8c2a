"""A comparison as a picture: TTFT and throughput against concurrency, a column for each clip length.

    python -m benchmarks.picture benchmarks/results/cpu/compare.json docs/images/cpu.png README.md

The figures of a page, if one is named, are written anew between its marks. The only importer of matplotlib. An
opaque light background, so that it reads the same on dark pages.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.bar import find_cell
from benchmarks.readme import with_figures

INK, GRID = "#24292f", "#d8dee4"
STYLES = {
    "tympan": ("Tympan", "#0b62d6", "o", 2.6),
    "vllm": ("vLLM (CPU)", "#c2540a", "s", 1.8),
    "transformers": ("transformers, static batch", "#6e7781", "^", 1.8),
}
ROWS = (("ttft_s", "median time to first token, s"), ("requests_per_s", "requests per second"))


def series(document: dict[str, Any], figure: str, clip_seconds: float) -> dict[str, list[tuple[int, float]]]:
    """(concurrency, value) of each system that was measured, in the order of concurrency."""
    found: dict[str, list[tuple[int, float]]] = {}
    for concurrency in sorted({cell["concurrency"] for cell in document["cells"]}):
        cell = find_cell(document, clip_seconds, concurrency)
        for name in ("tympan", "vllm"):
            if name in cell:
                found.setdefault(name, []).append((concurrency, cell[name][figure]))
    for row in sorted(document["offline"], key=lambda row: row["requests"]):
        if row["clip_seconds"] == clip_seconds:
            value = row[figure]["transformers"]
            found.setdefault("transformers", []).append(
                (row["requests"], value["p50"] if figure == "ttft_s" else value)
            )
    return found


def draw(document: dict[str, Any]) -> Figure:
    """All panels."""
    lengths = sorted({cell["clip_seconds"] for cell in document["cells"]})
    ticks = sorted({cell["concurrency"] for cell in document["cells"]})
    figure, panels = pyplot.subplots(2, len(lengths), figsize=(4.4 * len(lengths), 6.2), sharex=True, squeeze=False)
    for (name, label), row in zip(ROWS, panels, strict=True):
        for seconds, axes in zip(lengths, row, strict=True):
            _panel(axes, series(document, name, seconds), ticks)
            axes.set_title(f"clips of {seconds:g} s", fontsize=10, color=INK)
            if name == "ttft_s":
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}")
            else:
                axes.set_ylim(bottom=0)
                axes.set_xlabel("concurrent requests")
        row[0].set_ylabel(label)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False, bbox_to_anchor=(0.5, 0.93))
    checkpoint, hardware = document["checkpoint"], document["hardware"]
    figure.suptitle(
        f"Qwen2-Audio, {checkpoint['parameters'] / 1e6:.0f} M random parameters, {checkpoint['dtype']}, "
        f"{document['settings']['output_tokens']} tokens out\n{hardware['cpu']}, {hardware['cores']} cores, "
        f"{document['date'][:10]}",
        fontsize=9,
        color=INK,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    return figure


def _panel(axes: Axes, lines: dict[str, list[tuple[int, float]]], ticks: list[int]) -> None:
    places = {tick: place for place, tick in enumerate(ticks)}
    for name, points in lines.items():
        label, color, marker, width = STYLES[name]
        inside = [(places[concurrency], value) for concurrency, value in points if concurrency in places]
        axes.plot(*zip(*inside, strict=True), label=label, color=color, marker=marker, linewidth=width, markersize=5)
    axes.set_xticks(range(len(ticks)), [str(tick) for tick in ticks])
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.tick_params(colors=INK, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="what benchmarks.compare wrote")
    parser.add_argument("output", type=Path)
    parser.add_argument("page", type=Path, nargs="?", help="with marks between which the figures stand")
    args = parser.parse_args()
    document = json.loads(args.comparison.read_text(encoding="utf-8"))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(document).savefig(args.output, dpi=110, facecolor="white")
    if args.page:
        args.page.write_text(with_figures(args.page.read_text(encoding="utf-8"), document), encoding="utf-8")


if __name__ == "__main__":
    main()
