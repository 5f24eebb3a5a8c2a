"""The engine killed again and again under load: how soon its requests end, how soon it serves again, what is lost.

    python -m benchmarks.chaos [--kills 20] [--clients 8] [--limit 600]

A server of its own with the bundled checkpoint. Half of the clients stream, half want whole answers, each one after
the other; who is refused waits as it is told. Every third kill is a stop (SIGSTOP): the engine hangs and has to be
found out. A request may be lost only if it was in flight; an end without an error that a client understands is none.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.report import finish
from benchmarks.servers import Recipe, running
from tympan.load import percentiles

BETWEEN_S = 2.0
"""Of service between two kills."""
MAX_PAUSE_S = 1.0
"""Clients here are more eager than they are asked to be: so is the figure for the time back to service."""
BACK_LIMIT_S = 300.0


@dataclass(frozen=True)
class Outcome:
    """One request."""

    started: float
    ended: float
    end: str
    """served, refused or failed (both with an error in OpenAI's shape), cut (without one)."""


def recipe() -> Recipe:
    """The bundled checkpoint, with more restarts than anybody should need."""
    command = (
        *(sys.executable, "-m", "server", "--engine-restarts", "1000"),
        *("--max-num-seqs", "16", "--log-level", "error", "--host", "127.0.0.1", "--port"),
    )
    return Recipe("tympan", command, "/ready", {"OMP_NUM_THREADS": "1"})


async def ask(client: httpx.AsyncClient, *, stream: bool) -> Outcome:
    """One request to its end."""
    body = {
        "messages": [{"role": "user", "content": "Say something long."}],
        "stream": stream, "max_tokens": 100, "ignore_eos": True, "min_tokens": 100,
    }  # fmt: skip
    started = time.monotonic()
    try:
        response = await client.post("/v1/chat/completions", json=body)
        end = _end(response, stream=stream)
    except httpx.TransportError:
        end = "cut"
    return Outcome(started, time.monotonic(), end)


def _end(response: httpx.Response, *, stream: bool) -> str:
    if response.status_code != 200:
        return "refused" if "error" in response.json() else "cut"
    if not stream:
        return "served"
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        return "cut"
    return "failed" if "error" in json.loads(events[-2]) else "served"


async def keep_asking(client: httpx.AsyncClient, outcomes: list[Outcome], *, stream: bool) -> None:
    """One client, until cancelled."""
    while True:
        outcomes.append(await ask(client, stream=stream))
        if outcomes[-1].end != "served":
            await asyncio.sleep(MAX_PAUSE_S / 10)


def engine_of(pid: int) -> int:
    """The engine's process: the child that has torch."""
    children = psutil.Process(pid).children()
    return max(children, key=lambda child: child.memory_info().rss).pid


async def measure(url: str, pid: int, num_kills: int, num_clients: int, limit_s: float) -> dict[str, Any]:
    """Kill under load. -> the figures."""
    outcomes: list[Outcome] = []
    kills: list[tuple[float, str]] = []
    deadline = time.monotonic() + limit_s
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
        tasks = [
            asyncio.create_task(keep_asking(client, outcomes, stream=number % 2 == 0))
            for number in range(num_clients)
        ]
        while len(kills) < num_kills and time.monotonic() < deadline:
            await asyncio.sleep(BETWEEN_S)
            name = "SIGSTOP" if len(kills) % 3 == 2 else "SIGKILL"
            os.kill(engine_of(pid), getattr(signal, name))
            kills.append((time.monotonic(), name))
            await _wait_until_served(outcomes, kills[-1][0])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return summarise(outcomes, kills)


async def _wait_until_served(outcomes: list[Outcome], since: float) -> None:
    """A request that began after the kill. Raises TimeoutError."""
    async with asyncio.timeout(BACK_LIMIT_S):
        while not any(outcome.end == "served" and outcome.started > since for outcome in outcomes[-1000:]):
            await asyncio.sleep(0.02)


def summarise(outcomes: Sequence[Outcome], kills: Sequence[tuple[float, str]]) -> dict[str, Any]:
    """Times from a kill to the end of what was in flight and to the first answer asked for after it, by signal."""
    ends: dict[str, list[float]] = {"SIGKILL": [], "SIGSTOP": []}
    backs: dict[str, list[float]] = {"SIGKILL": [], "SIGSTOP": []}
    num_lost = 0
    for at, name in kills:
        lost = [one for one in outcomes if one.started <= at < one.ended and one.end != "served"]
        num_lost += len(lost)
        ends[name] += [one.ended - at for one in lost]
        backs[name] += [min(one.ended for one in outcomes if one.started > at and one.end == "served") - at]
    counts = Counter(outcome.end for outcome in outcomes)
    return {
        "kills": dict(Counter(name for _, name in kills)),
        "requests": dict(counts),
        "lost_in_flight": num_lost,
        "failed_not_in_flight": counts["failed"] + counts["cut"] - sum(
            one.end in ("failed", "cut") and any(one.started <= at < one.ended for at, _ in kills)
            for one in outcomes
        ),
        "seconds_to_clean_end": {name: {**percentiles(times), "max": max(times, default=None)}
                                 for name, times in ends.items()},
        "seconds_to_service": {name: {**percentiles(times), "max": max(times, default=None)}
                               for name, times in backs.items()},
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """-> 1 when a request ended without a word, or one was lost that was not in flight."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--limit", type=float, default=600, help="most seconds")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    with running(recipe()) as server:
        result = asyncio.run(measure(server.url, server.pid, args.kills, args.clients, args.limit))
    finish({"benchmark": "chaos", **result}, args.output)
    return int(result["requests"].get("cut", 0) > 0 or result["failed_not_in_flight"] > 0)


if __name__ == "__main__":
    sys.exit(main())
