"""What Tympan wants to reach on an H200 with the shape of Qwen2-Audio-7B, line by line, and whether a document
does.

Pure: what `benchmarks.gpu` writes goes in, lines come out. A line without a figure is unmeasured and names the
command that will measure it; only figures of the full size on a GPU count. Floors are those of an H200; on another
GPU they come from the copy bandwidth and the products that were measured in the same run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.bar import Line, ratio
from benchmarks.gpu.floors import H200, Ceilings, decode_step_s
from benchmarks.gpu.shapes import SHAPES

STEP_TO_FLOOR = 1.25
FP8_BATCH, FP8_SPEEDUP = 64, 1.4
TTFT_S = {30.0: 0.045, 2.0: 0.020}
OFFLINE_REQUESTS_PER_S = 11.0
TO_TRANSFORMERS = 8.0


@dataclass(frozen=True)
class GpuLine(Line):
    """One demand, and the parts whose figures it needs."""

    parts: tuple[str, ...]

    @property
    def command(self) -> str:
        """What measures it."""
        return f"python -m benchmarks.gpu {' '.join(self.parts)}"

    def __str__(self) -> str:
        return super().__str__() if self.figure is not None else f"{super().__str__()}  [{self.command}]"


def add_to(document: dict[str, Any]) -> dict[str, Any]:
    """The document with its floors and its bar."""
    lines = [{**line.as_row(), "command": line.command} for line in evaluate(document)]
    return {**document, "floors": floors(document), "bar": lines}


def evaluate(document: dict[str, Any]) -> list[GpuLine]:
    """Every line of the bar."""
    return [*_steps(document), *_first_token(document), *_offline(document)]


def figure_of(document: dict[str, Any], part: str, cell: str, name: str) -> float | None:
    """One figure of the full size on a GPU; None where it was not measured."""
    if document.get("shape") != "7b" or document.get("device") != "cuda":
        return None
    row = row_of(document, part, cell)
    return None if row is None else row.get(name)


def row_of(document: dict[str, Any], part: str, cell: str) -> dict[str, Any] | None:
    """A cell's figures, whatever was measured."""
    cells = document.get("parts", {}).get(part, {}).get("cells", [])
    return next((each["row"] for each in cells if each["cell"] == cell and "row" in each), None)


def best_of(document: dict[str, Any], part: str, name: str) -> float | None:
    """The largest figure of all cells."""
    cells = document.get("parts", {}).get(part, {}).get("cells", [])
    figures = [figure_of(document, part, cell["cell"], name) for cell in cells]
    return max((figure for figure in figures if figure is not None), default=None)


def ceilings_of(document: dict[str, Any]) -> Ceilings | None:
    """Those of an H200 where it is one or nothing was measured, else what was measured; None where that failed."""
    gpu = document.get("hardware", {}).get("gpu")
    if gpu is None or "H200" in gpu:
        return H200
    copied = figure_of(document, "ceilings", "copy", "bytes_per_s")
    multiplied = figure_of(document, "ceilings", "gemm square", "flop_per_s")
    return Ceilings(copied, multiplied, f"measured: {gpu}") if copied and multiplied else None


def floors(document: dict[str, Any]) -> dict[str, Any] | None:
    """Milliseconds of a decode step by batch, at the bar's context."""
    ceilings = ceilings_of(document)
    if ceilings is None:
        return None
    shape = SHAPES["7b"]
    steps = {str(b): 1000 * decode_step_s(shape.config, b, shape.context, ceilings) for b in shape.batches}
    return {"source": ceilings.source, "context": shape.context, "decode_step_ms": steps}


def _steps(document: dict[str, Any]) -> Iterator[GpuLine]:
    shape, ceilings = SHAPES["7b"], ceilings_of(document)
    for batch in shape.batches:
        cell = f"default, batch {batch}"
        ms = figure_of(document, "steps", cell, "ms")
        context = figure_of(document, "steps", cell, "context") or shape.context
        floor = ceilings and 1000 * decode_step_s(shape.config, batch, context, ceilings)
        text = f"decode step, measured / floor: batch {batch}, 1,000 tokens of context"
        yield GpuLine(text, ratio(ms, floor), "<=", STEP_TO_FLOOR, ("ceilings", "steps"))
    plain, small = (
        figure_of(document, "steps", f"{name}, batch {FP8_BATCH}", "ms") for name in ("default", "fp8 KV")
    )
    text = f"decode step, bf16 / fp8 KV: batch {FP8_BATCH}, 1,000 tokens of context"
    yield GpuLine(text, ratio(plain, small), ">=", FP8_SPEEDUP, ("steps",))


def _first_token(document: dict[str, Any]) -> Iterator[GpuLine]:
    for seconds, bound in TTFT_S.items():
        times = figure_of(document, "http", f"idle, {seconds:g} s clip", "ttft_s")
        figure = times["p50"] if isinstance(times, dict) else None
        text = f"median seconds from a request's bytes to the first token, one {seconds:g} s clip, idle server"
        yield GpuLine(text, figure, "<=", bound, ("http",))


def _offline(document: dict[str, Any]) -> Iterator[GpuLine]:
    ours = best_of(document, "offline", "requests_per_s")
    theirs = best_of(document, "transformers", "requests_per_s")
    yield GpuLine(
        "requests/s, 800 tokens in, 200 out, all at once", ours, ">=", OFFLINE_REQUESTS_PER_S, ("offline",)
    )
    text = "requests/s, ours / Hugging Face's best batch, same run"
    yield GpuLine(text, ratio(ours, theirs), ">=", TO_TRANSFORMERS, ("offline", "transformers"))
