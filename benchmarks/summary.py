"""A simulated run in figures: rates and percentiles of a window of it, as one row of a table. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.simulation import Fleet, Flight, Gaps
from tympan.load import percentiles

COLUMNS = {
    "users": "{:>6}",
    "replicas": "{:>8}",
    "requests_per_s": "{:>8.2f}",
    "output_tokens_per_s": "{:>8.0f}",
    "audio_seconds_per_s": "{:>8.0f}",
    "ttft_s": "{:>24}",
    "inter_token_latency_s": "{:>24}",
    "busy": "{:>5.0%}",
    "kv_cache_usage": "{:>5.0%}",
    "num_waiting": "{:>7.1f}",
    "num_preemptions": "{:>7}",
}
HEADINGS = (
    *("users", "replicas", "req/s", "tok/s", "audio/s", "TTFT ms p50/p95/p99", "ITL ms p50/p95/p99"),
    *("busy", "KV", "waiting", "preempt"),
)


def summarise(fleet: Fleet, window: tuple[float, float] | None) -> dict[str, Any]:
    """Rates of what ended within the window, latencies of what was sent within it. None: the whole run."""
    start, stop = window or (0.0, fleet.now)
    ended = [flight for flight in fleet.done if start <= flight.last_token <= stop]
    span = stop - start
    elapsed = max(fleet.now, 1e-9) * len(fleet.replicas)
    return {
        "requests": len(ended),
        "requests_per_s": len(ended) / span,
        "output_tokens_per_s": sum(flight.num_tokens for flight in ended) / span,
        "audio_seconds_per_s": sum(sum(flight.job.clip_seconds) for flight in ended) / span,
        **latencies([flight for flight in fleet.done if start <= flight.sent <= stop]),
        "inter_token_latency_s": _gaps([replica.gaps for replica in fleet.replicas], start, stop),
        "busy": sum(replica.busy_s for replica in fleet.replicas) / elapsed,
        "kv_cache_usage": sum(replica.kv_usage_s for replica in fleet.replicas) / elapsed,
        "num_waiting": sum(replica.waiting_s for replica in fleet.replicas) / elapsed,
        "num_preemptions": sum(replica.scheduler.stats.num_preemptions for replica in fleet.replicas),
        "num_steps": sum(replica.num_steps for replica in fleet.replicas),
    }


def latencies(flights: Sequence[Flight]) -> dict[str, Any]:
    """Of some requests: to the first token, to the last, the part of the front end, and the longest silence."""
    first = [flight.first_token - flight.sent for flight in flights if flight.first_token is not None]
    return {
        "ttft_s": percentiles(first),
        "end_to_end_s": percentiles([flight.last_token - flight.sent for flight in flights]),
        "front_s": percentiles([flight.ready - flight.sent for flight in flights]),
        "worst_gap_s": percentiles([flight.worst_gap for flight in flights]),
    }


def print_table(rows: Iterable[dict[str, Any]], *, heading: bool = True) -> None:
    """For people."""
    widths = [len(form.format(0)) for form in COLUMNS.values()]
    if heading:
        print(" ".join(f"{name:>{width}}" for name, width in zip(HEADINGS, widths, strict=True)))
    for row in rows:
        cells = []
        for name, form in COLUMNS.items():
            value = row[name]
            if isinstance(value, dict):
                value = "/".join(f"{1000 * (value[key] or 0):.0f}" for key in ("p50", "p95", "p99"))
            cells.append(form.format(value))
        print(" ".join(cells), flush=True)


def _gaps(parts: Sequence[Gaps], start: float, stop: float) -> dict[str, float | None]:
    values, counts, ends = (
        np.concatenate([np.asarray(getattr(part, name), dtype=float) for part in parts])
        for name in ("values", "counts", "ends")
    )
    inside = (start <= ends) & (ends <= stop)
    values, counts = values[inside], counts[inside]
    if not len(values):
        return percentiles([])
    order = np.argsort(values)
    reached = np.cumsum(counts[order])
    ranks = {f"p{p}": float(values[order][np.searchsorted(reached, p / 100 * reached[-1])]) for p in (50, 95, 99)}
    return {"mean": float((values * counts).sum() / reached[-1]), **ranks}
