"""`tympan bench`: load on a server, and what its users would get of it, as a table or as JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from server.version import VERSION
from tympan.cli.endpoint import Endpoint
from tympan.cli.errors import EXIT_FAILED, CommandError
from tympan.load import LoadPlan, measure

RATES = {
    "requests_per_s": "requests/s",
    "output_tokens_per_s": "output tokens/s",
    "audio_seconds_per_s": "seconds of audio/s",
}
TIMES = {
    "ttft_s": "time to first token",
    "time_per_output_token_s": "time per output token",
    "inter_token_latency_s": "between chunks",
    "end_to_end_s": "whole answer",
}
RANKS = ("mean", "p50", "p95", "p99")


def run(endpoint: Endpoint, plan: LoadPlan, output: Path | None, *, as_json: bool) -> int:
    """Measure and report. -> exit status, which is 1 when a request failed. Raises CommandError."""
    if output is not None and output.exists():
        raise CommandError(f"{output} exists: name another file by --output")
    plan = replace(plan, url=endpoint.url, api_key=endpoint.api_key)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("requests", total=plan.requests)
        with endpoint.failures():
            figures = asyncio.run(measure(plan, lambda _: progress.advance(task)))
    date = datetime.now(UTC).isoformat(timespec="seconds")
    document = json.dumps({"date": date, "url": endpoint.url, "tympan": VERSION, **figures}, indent=1)
    if output is not None:
        try:
            output.write_text(f"{document}\n", encoding="utf-8")
        except OSError as problem:
            raise CommandError(f"{output}: {problem.strerror}") from None
    console = Console(highlight=False, markup=False)
    if as_json:
        sys.stdout.write(f"{document}\n")
    else:
        for table in tables(figures):
            console.print(table)
    for error in figures["errors"]:
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"tympan: {error}")
    return EXIT_FAILED if figures["num_errors"] else 0


def tables(figures: dict[str, Any]) -> list[Table]:
    """Rates, then times in milliseconds."""
    rates = Table("", figures["model"], box=None, pad_edge=False)
    rates.add_row("requests", f"{figures['requests']}, of which {figures['num_errors']} failed")
    for key, name in RATES.items():
        rates.add_row(name, f"{figures[key]:.2f}")
    times = Table("ms", *RANKS, box=None, pad_edge=False)
    for key, name in TIMES.items():
        values = (figures[key][rank] for rank in RANKS)
        times.add_row(name, *("-" if value is None else f"{1000 * value:.1f}" for value in values))
    return [rates, times]
