"""What Tympan wants to reach on a CPU, line by line, and whether a comparison's figures reach it.

Pure: the document that `benchmarks.compare` makes goes in, lines come out. Every figure but two is a ratio to a peer
that ran in the same comparison; llama.cpp is no wheel and is not run, so its time per token is a measured constant.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

LLAMA_CPP_TOKEN_S = 0.0043
"""llama.cpp 11434 (llama-server, bfloat16, 2 threads), one stream, a checkpoint of this size, two cores of an AMD
EPYC with avx512_bf16; not measured by this script."""

RELATIONS = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Line:
    """One demand. `figure` is None where a side was not measured, and then it neither holds nor fails."""

    text: str
    figure: float | None
    relation: str
    bound: float

    @property
    def holds(self) -> bool | None:
        """Whether the figure is within the bound."""
        return None if self.figure is None else bool(RELATIONS[self.relation](self.figure, self.bound))

    def as_row(self) -> dict[str, Any]:
        """For the JSON document."""
        return {**asdict(self), "holds": self.holds}

    def __str__(self) -> str:
        figure = "-" if self.figure is None else f"{self.figure:.3g}"
        verdict = {True: "holds", False: "FAILS", None: "not measured"}[self.holds]
        return f"{verdict:12} {figure:>8} {self.relation} {self.bound:<6.3g} {self.text}"


def evaluate(document: dict[str, Any]) -> list[Line]:
    """Every line of the bar."""
    return [*_beside_vllm(document), *_beside_transformers(document), *_alone(document)]


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """Ours to theirs, where both are known."""
    return ours / theirs if ours is not None and theirs else None


def _beside_vllm(document: dict[str, Any]) -> Iterator[Line]:
    demands = [
        (10.0, 16, "requests_per_s", ">=", 1.8),
        (10.0, 16, "ttft_s", "<=", 0.5),
        (2.0, 16, "requests_per_s", ">=", 3.0),
        (2.0, 16, "ttft_s", "<=", 0.3),
        (10.0, 1, "ttft_s", "<=", 0.5),
        (10.0, 1, "time_per_output_token_s", "<=", 0.8),
    ]
    names = {"requests_per_s": "requests/s", "ttft_s": "median TTFT", "time_per_output_token_s": "time per token"}
    for seconds, concurrency, figure, relation, bound in demands:
        cell = find_cell(document, seconds, concurrency)
        yield Line(
            f"{names[figure]}, ours / vLLM: {concurrency} at once, {seconds:.0f} s clips",
            cell.get("ratio", {}).get(figure),
            relation,
            bound,
        )
    servers = document["servers"]
    memory = [servers.get(name, {}).get("memory_bytes") for name in ("tympan", "vllm")]
    yield Line("resident memory under load, ours / vLLM", ratio(*memory), "<=", 0.25)


def _beside_transformers(document: dict[str, Any]) -> Iterator[Line]:
    rows = {row["clip_seconds"]: row["speedup"] for row in document["offline"] if row["requests"] == 16}
    for seconds in (10.0, 2.0):
        yield Line(
            f"requests/s, ours / transformers' static batch of 16, {seconds:.0f} s clips",
            rows.get(seconds),
            ">=",
            4.0,
        )


def _alone(document: dict[str, Any]) -> Iterator[Line]:
    per_token = find_cell(document, 10.0, 1).get("tympan", {}).get("time_per_output_token_s")
    yield Line(
        "time per token, ours / llama.cpp's 4.3 ms: one stream, 10 s clips",
        ratio(per_token, LLAMA_CPP_TOKEN_S),
        "<=",
        1.5,
    )
    yield Line("seconds from start to /ready", document["servers"]["tympan"]["ready_s"], "<=", 6.0)


def find_cell(document: dict[str, Any], clip_seconds: float, concurrency: int) -> dict[str, Any]:
    """A cell of the comparison; empty where it was not measured."""
    at = (clip_seconds, concurrency)
    return next((c for c in document["cells"] if (c["clip_seconds"], c["concurrency"]) == at), {})
