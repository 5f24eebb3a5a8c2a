"""A document of `benchmarks.gpu` as text: the bar, and tables with the floors beside. Pure.

What was not measured says so, with the command that will measure it; nothing is estimated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks.gpu import bar
from benchmarks.gpu.floors import H200, decode_step_s
from benchmarks.gpu.shapes import SHAPES

UNMEASURED = "unmeasured"
EMPTY: dict[str, Any] = {"shape": "7b", "device": "cuda", "hardware": {"gpu": None}, "parts": {}}
"""A document of nothing."""


def render(document: dict[str, Any]) -> str:
    """All sections, in markdown."""
    sections = (_source, _bar, _steps, _kernels, _fused, _clips, _serving, _memory)
    return "\n\n".join("\n".join(section(document)) for section in sections) + "\n"


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A markdown table."""
    yield f"| {' | '.join(heading)} |"
    yield f"|{' --- |' * len(heading)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def number(value: float | None, scale: float = 1.0, form: str = ".3g") -> str:
    """A figure, or that there is none."""
    return UNMEASURED if value is None else f"{value * scale:{form}}"


def _source(document: dict[str, Any]) -> Iterator[str]:
    gpu = document["hardware"]["gpu"]
    if gpu is None:
        yield "**Nothing here has been measured yet.** Floors are computed, not measured: what an H200 (4.3 TB/s"
        yield "device copy, 780 TFLOP/s bf16) cannot do better."
        return
    versions = document["versions"]
    yield f"{gpu}, torch {versions.get('torch')}, Python {versions['python']}, {document['date'][:10]}: random"
    yield "weights of Qwen2-Audio-7B's shape in bfloat16, seeded and never zeros."


def _bar(document: dict[str, Any]) -> Iterator[str]:
    yield "### The bar"
    yield ""
    rows = []
    for line in bar.evaluate(document):
        wanted = f"{'at most' if line.relation == '<=' else 'at least'} {line.bound:g}"
        verdict = {True: "holds", False: "**missed**", None: f"`{line.command}`"}[line.holds]
        rows.append((line.text, wanted, number(line.figure), verdict))
    yield from table(("", "wanted", "measured", "holds, or what will measure it"), rows)


def _steps(document: dict[str, Any]) -> Iterator[str]:
    shape, ceilings = SHAPES["7b"], bar.ceilings_of(document) or H200
    yield "### Decode steps of the engine, ms, 1,000 tokens of context"
    yield ""
    variants = ["default", *_variants(document)]
    rows = []
    for batch in shape.batches:
        floor = 1000 * decode_step_s(shape.config, batch, shape.context, ceilings)
        figures = [
            bar.figure_of(document, part, f"{name}, batch {batch}", "ms")
            for name in variants
            for part in [_part_of(document, name)]
        ]
        rows.append((str(batch), f"{floor:.2f}", *(number(figure, form=".2f") for figure in figures)))
    yield from table(("batch", "floor", *variants), rows)


def _variants(document: dict[str, Any]) -> list[str]:
    """Of the parts `steps` and `ablations`, those that have a figure."""
    found: dict[str, None] = {}
    for part in ("steps", "ablations"):
        for cell in document["parts"].get(part, {}).get("cells", []):
            if "row" in cell and ", batch " in cell["cell"]:
                found[cell["cell"].split(", batch ")[0]] = None
    found.pop("default", None)
    return list(found) or ["fp8 KV", "no graphs", "no overlap"]


def _part_of(document: dict[str, Any], variant: str) -> str:
    cells = document["parts"].get("steps", {}).get("cells", [])
    return "steps" if any(cell["cell"].startswith(f"{variant}, ") for cell in cells) else "ablations"


def _kernels(document: dict[str, Any]) -> Iterator[str]:
    yield "### Attention kernels, one layer"
    yield ""
    yield "Decodes: microseconds, and keys and values read a second against the copy bandwidth. Prompts and clips:"
    yield "TFLOP/s. `error`: largest difference to plain torch over its largest number."
    yield ""
    copied = bar.figure_of(document, "ceilings", "copy", "bytes_per_s")
    rows = []
    for cell in document["parts"].get("kernels", {}).get("cells", []):
        row = cell.get("row", {})
        if "us" not in row or bar.figure_of(document, "kernels", cell["cell"], "us") is None:
            continue
        moved, computed = row.get("bytes_per_s"), row.get("flop_per_s")
        rate = f"{moved / 1e9:,.0f} GB/s" if moved else f"{computed / 1e12:.0f} TFLOP/s"
        share = f"{moved / copied:.0%}" if moved and copied else ""
        rows.append((cell["cell"], f"{row['us']:.1f}", rate, share, number(row.get("error"), form=".1e")))
    yield from _or_command(("", "us", "rate", "of a copy", "error"), rows, "kernels")


def _fused(document: dict[str, Any]) -> Iterator[str]:
    yield "### Fused kernels beside plain torch"
    yield ""
    rows = []
    for cell in document["parts"].get("fused", {}).get("cells", []):
        row = cell.get("row", {})
        if row.get("kernel") and document["device"] == "cuda":
            figures = (row["kernel"]["us"], row["plain"]["us"], row["speedup"], row["bytes_per_s"] / 1e9)
            rows.append((cell["cell"], *(f"{figure:,.1f}" for figure in figures)))
    yield from _or_command(("", "kernel, us", "torch, us", "times as fast", "GB/s"), rows, "fused")


def _clips(document: dict[str, Any]) -> Iterator[str]:
    yield "### Clips: log-mel, encoder and projector, ms"
    yield ""
    shape = SHAPES["7b"]
    rows = []
    for seconds in shape.clip_seconds:
        cells = [f"{count} clips of {seconds:g} s" for count in shape.clips_at_once]
        figures = [bar.figure_of(document, "encoder", cell, "ms") for cell in cells]
        share = bar.figure_of(document, "encoder", cells[0], "log_mel_share")
        first = bar.figure_of(document, "encoder", f"first token, {seconds:g} s clip", "ms")
        if figures[0] is not None:
            rows.append((f"{seconds:g} s", *map(number, figures), number(share, 100, ".0f"), number(first)))
    counts = [f"{count} at once" for count in shape.clips_at_once]
    yield from _or_command(("clip", *counts, "log-mel, %", "first token without HTTP"), rows, "encoder")


def _serving(document: dict[str, Any]) -> Iterator[str]:
    yield "### Over HTTP: 800 tokens in, 200 out, open loop"
    yield ""
    rows = []
    for rate in SHAPES["7b"].rates:
        row = bar.row_of(document, "http", f"{rate:g} requests/s") if document["device"] == "cuda" else None
        if row and document["shape"] == "7b":
            times = [row[name] for name in ("ttft_s", "inter_token_latency_s", "end_to_end_s")]
            cells = [f"{1000 * each['p50']:,.0f} / {1000 * each['p99']:,.0f}" for each in times]
            rows.append((f"{rate:g}", f"{row['requests_per_s']:.1f}", *cells))
    heading = ("requests/s sent", "answered", "TTFT, ms, p50 / p99", "between tokens", "whole")
    yield from _or_command(heading, rows, "http")


def _memory(document: dict[str, Any]) -> Iterator[str]:
    yield "### Memory with default settings"
    yield ""
    rows = []
    for name in ("default", "fp8 KV"):
        tokens = bar.figure_of(document, "memory", f"{name}, start", "tokens")
        if tokens is not None:
            sequences = bar.figure_of(document, "memory", f"{name}, start", "sequences_of_context")
            peak = bar.figure_of(document, "memory", f"{name}, full", "peak_reserved_bytes")
            rows.append((name, number(tokens, form=",.0f"), number(sequences), number(peak, 2**-30, ".1f")))
    yield from _or_command(("", "tokens of KV", "sequences of 1,000", "peak, GiB"), rows, "memory")


def _or_command(heading: Sequence[str], rows: list[tuple[str, ...]], part: str) -> Iterator[str]:
    if rows:
        yield from table(heading, rows)
    else:
        yield f"Unmeasured: `python -m benchmarks.gpu {part}`."
