"""A load generator for any OpenAI-compatible server that takes audio: `tympan.load`, as `tympan bench` runs it.

    python -m benchmarks.load --url http://127.0.0.1:8000 --concurrency 16 --requests 64          closed loop
    python -m benchmarks.load --url http://127.0.0.1:8000 --rate 4 --requests 64                  open loop

The last line is one JSON document, with this machine's hardware and versions.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.report import finish
from tympan.load import LoadPlan, measure


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument("--api-key")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--concurrency", type=int, default=16, help="closed loop")
    parser.add_argument("--rate", type=float, help="open loop: arrivals a second")
    parser.add_argument("--clip-seconds", type=float, default=10.0)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--timeout", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure as the command line says. -> the figures."""
    plan = LoadPlan(
        url=f"{args.url}/v1",
        model=args.model,
        api_key=args.api_key,
        requests=args.requests,
        warmup=args.warmup,
        concurrency=args.concurrency,
        rate=args.rate,
        clip_seconds=args.clip_seconds,
        output_tokens=args.output_tokens,
        timeout=args.timeout,
        seed=args.seed,
    )
    with tqdm(total=args.requests, desc="requests", unit="req") as progress:
        return asyncio.run(measure(plan, lambda _: progress.update()))


def main() -> None:
    """Measure, print, keep."""
    args = parse()
    finish(run(args), args.output)


if __name__ == "__main__":
    main()
