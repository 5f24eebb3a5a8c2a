"""Tympan beside vLLM's CPU build and transformers: the same checkpoint, the same requests, in turn.

    python -m benchmarks.compare [--venv .peers/vllm] [--rounds 2] [--output FILE]

Our server and vLLM run one after the other, never both, with the same precision, context, number of sequences and
room for keys and values, and both with every core. Rounds go ours, vLLM, vLLM, ours, …: what drifts on the machine
meets both. In a round each server gets the same bytes, clips that nobody has seen before, from a closed loop of 1, 4
and 16 clients (`benchmarks.load`); a warm-up comes first. Resident memory is the peak of a load of its own that is
not timed.
transformers answers static batches in `benchmarks.offline`, in a process of its own, beside our engine without HTTP.
The figures of a cell are medians over its rounds. The bar (`benchmarks.bar`) is printed, and is in the document.

Processor time over wall time and cores tells whether the machine was quiet: below 0.9 at 16 at once something else
ran, or the server left a core idle.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import bar, load
from benchmarks.make_checkpoint import write_checkpoint
from benchmarks.peers.install_vllm import DEFAULT_VENV, installed_version
from benchmarks.report import finish
from benchmarks.servers import ROOT, Recipe, RunningServer, running, tympan, vllm
from engine.device import resolve_dtype

FIGURES = ("requests_per_s", "output_tokens_per_s", "ttft_s", "time_per_output_token_s", "cpu_share")
COMPARED = ("requests_per_s", "ttft_s", "time_per_output_token_s")
SEEDS_OF_A_CELL = 1000
FIRST_MEASURED_SEED = 100_000
MIN_REPEATS = 3
"""Of a batch beside transformers: the first still meets new memory, and the median of two is a mean."""

Cell = tuple[float, int]


def visits(names: list[str], rounds: int) -> list[tuple[str, list[int]]]:
    """Who is started when, and for which rounds: a server stays up where its next round follows at once."""
    turns = [
        (name, number) for number in range(rounds) for name in (names if number % 2 == 0 else list(reversed(names)))
    ]
    return [
        (name, [number for _, number in group]) for name, group in itertools.groupby(turns, key=lambda turn: turn[0])
    ]


def median_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One side of a cell from its rounds."""
    prompt_tokens = statistics.median(run["prompt_tokens"] for run in runs)
    return {
        **{name: statistics.median(run[name] for run in runs) for name in FIGURES},
        "prompt_tokens": prompt_tokens,
        "rounds": [{name: run[name] for name in FIGURES} for run in runs],
    }


def compare_cell(cell: Cell, requests: int, taken: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """All sides of a cell, and ours as ratio to vLLM's."""
    sides = {name: median_of(runs) for name, runs in taken.items()}
    row = {"clip_seconds": cell[0], "concurrency": cell[1], "requests": requests, **sides}
    if len(sides) > 1:
        row["ratio"] = {name: bar.ratio(sides["tympan"][name], sides["vllm"][name]) for name in COMPARED}
    return row


def drive(server: RunningServer, cell: Cell, requests: int, tokens: int, seed: int) -> dict[str, Any]:
    """One cell on one server. Raises RuntimeError if a request fails or is answered short."""
    seconds, concurrency = cell
    words = ["--url", server.url, "--clip-seconds", seconds, "--concurrency", concurrency, "--requests", requests]
    words += ["--warmup", 0, "--output-tokens", tokens, "--seed", seed]
    cpu_before = server.cpu_seconds()
    run = load.run(load.parse([str(word) for word in words]))
    cpu_s = server.cpu_seconds() - cpu_before
    written = round(run["output_tokens_per_s"] * run["wall_s"])
    if run["num_errors"] or written != requests * tokens:
        raise RuntimeError(f"{run['num_errors']} of {requests} requests failed, {written} tokens: {run['errors']}")
    return {
        **run,
        "ttft_s": run["ttft_s"]["p50"],
        "time_per_output_token_s": run["time_per_output_token_s"]["p50"],
        "cpu_share": cpu_s / (run["wall_s"] * (os.cpu_count() or 1)),
    }


def visit(args: argparse.Namespace, recipe: Recipe, rounds: list[int]) -> dict[str, Any]:
    """One life of a server: start, warm-up, its rounds, memory, end."""
    cells = cells_of(args)
    largest = max(args.concurrency)
    runs: dict[Cell, list[dict[str, Any]]] = {cell: [] for cell in cells}
    with running(recipe) as server:
        fresh = server.memory()
        for number, seconds in enumerate(args.clip_seconds):
            drive(server, (seconds, largest), largest, args.output_tokens, seed=number * SEEDS_OF_A_CELL)
        for round_number in rounds:
            for number, cell in enumerate(cells):
                seed = FIRST_MEASURED_SEED + (round_number * len(cells) + number) * SEEDS_OF_A_CELL
                runs[cell].append(drive(server, cell, requests_of(args, cell), args.output_tokens, seed))
        with server.peak_memory() as peak:
            drive(server, (max(args.clip_seconds), largest), largest, args.output_tokens, seed=50_000)
        return {"ready_s": server.ready_s, "fresh": asdict(fresh), "under_load": asdict(peak), "runs": runs}


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """In the order in which they are measured."""
    return [(seconds, concurrency) for seconds in args.clip_seconds for concurrency in args.concurrency]


def requests_of(args: argparse.Namespace, cell: Cell) -> int:
    """So many that every client has a few, and one client more than a few."""
    return max(args.min_requests, 2 * cell[1])


def measure(args: argparse.Namespace, checkpoint: Path, dtype: str) -> dict[str, Any]:
    """Both servers. -> their facts, and the cells."""
    recipes = {"tympan": tympan(checkpoint, dtype, args.kv_gib, args.threads, args.extra.split())}
    if installed_version(args.venv):
        recipes["vllm"] = vllm(args.venv, checkpoint, dtype, args.kv_gib, args.threads)
    lives: dict[str, list[dict[str, Any]]] = {name: [] for name in recipes}
    for name, rounds in visits(list(recipes), args.rounds):
        print(f"{name}: rounds {[number + 1 for number in rounds]}", file=sys.stderr)
        lives[name].append(visit(args, recipes[name], rounds))
    measured = [life[when] for each in lives.values() for life in each for when in ("fresh", "under_load")]
    measure_name = "rss" if any(memory["pss"] is None for memory in measured) else "pss"
    servers = {}
    for name, recipe in recipes.items():
        of_lives = {when: [life[when][measure_name] for life in lives[name]] for when in ("fresh", "under_load")}
        servers[name] = {
            "command": recipe.shown(checkpoint),
            "ready_s": statistics.median(life["ready_s"] for life in lives[name]),
            "ready_s_each": [life["ready_s"] for life in lives[name]],
            "memory_bytes": max(of_lives["under_load"]),
            "memory_bytes_fresh": max(of_lives["fresh"]),
            "rss_bytes": max(life["under_load"]["rss"] for life in lives[name]),
        }
    cells = [
        compare_cell(
            cell,
            requests_of(args, cell),
            {name: [run for life in each for run in life["runs"][cell]] for name, each in lives.items()},
        )
        for cell in cells_of(args)
    ]
    return {"memory_measure": measure_name, "servers": servers, "cells": cells}


def offline(args: argparse.Namespace, checkpoint: Path, dtype: str) -> list[dict[str, Any]]:
    """transformers beside our engine. -> rows of `benchmarks.offline`."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "offline.json"
        words = ["--model", checkpoint, "--dtype", dtype, "--output-tokens", args.output_tokens, "--output", output]
        words += [
            "--requests",
            *args.concurrency,
            "--clip-seconds",
            *args.clip_seconds,
            "--repeats",
            max(args.rounds, MIN_REPEATS),
        ]
        command = [sys.executable, "-m", "benchmarks.offline", *(str(word) for word in words)]
        environment = {**os.environ, **({"OMP_NUM_THREADS": str(args.threads)} if args.threads else {})}
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=environment)
        return json.loads(output.read_text(encoding="utf-8"))["rows"]


def notes(document: dict[str, Any]) -> Iterator[str]:
    """What a reader of the figures has to know."""
    kv = document["settings"]["kv_cache_gib"]
    yield f"memory: {document['memory_measure'].upper()} summed over each server's processes, peak at 16 at once"
    yield f"vLLM touches its {kv} GiB for keys and values at the start, ours, with the same room, what it uses"
    yield "llama.cpp is no wheel and is not run: its 4.3 ms per token are a measured constant (benchmarks/bar.py)"
    if document["checkpoint"]["dtype"] != "bfloat16":
        yield "this CPU has no native bfloat16: all sides run in float32"
    if document["skipped"]:
        yield f"skipped: {', '.join(document['skipped'])}"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole comparison."""
    dtype = str(resolve_dtype("auto", "bfloat16", torch.device("cpu"))[0]).removeprefix("torch.")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch)
        parameters = write_checkpoint(checkpoint, args.size, dtype)
        version = installed_version(args.venv)
        document: dict[str, Any] = {
            "benchmark": "compare",
            "checkpoint": {"size": args.size, "parameters": parameters, "dtype": dtype},
            "settings": {
                "output_tokens": args.output_tokens,
                "rounds": args.rounds,
                "kv_cache_gib": args.kv_gib,
                "threads": args.threads or os.cpu_count(),
            },
            "peers": {"vllm": version},
            "skipped": [] if version else ["vllm: not installed (make peers)"],
            **measure(args, checkpoint, dtype),
            "offline": offline(args, checkpoint, dtype),
        }
    lines = bar.evaluate(document)
    document["bar"] = [line.as_row() for line in lines]
    document["notes"] = list(notes(document))
    document["took_s"] = time.perf_counter() - started
    report(lines, document["notes"])
    return document


def report(lines: Iterable[bar.Line], remarks: Iterable[str]) -> None:
    """The bar, for people."""
    for text in (*map(str, lines), *(f"- {remark}" for remark in remarks)):
        print(text)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=DEFAULT_VENV, help="where vLLM is installed")
    parser.add_argument("--size", default="small")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--clip-seconds", type=float, nargs="+", default=[10.0, 2.0])
    parser.add_argument("--min-requests", type=int, default=6)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--kv-gib", type=int, default=2, help="room for keys and values, of either server")
    parser.add_argument("--threads", type=int, help="of each server's computing; default: every core")
    parser.add_argument("--extra", default="", help="more options for our server, in one string")
    parser.add_argument("--output", type=Path)
    return parser.parse_args(arguments)


def main() -> None:
    """Compare as the command line says."""
    args = parse()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # unwinds, which ends the servers
    finish(run(args), args.output)


if __name__ == "__main__":
    main()
