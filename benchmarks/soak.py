"""Mixed traffic at capacity for a while: does memory grow, do descriptors, is anything left, does anything fail?

    python -m benchmarks.soak [--minutes 20] [--clients 24]

Chats and streams with and without audio, transcriptions, uploads, clients that leave at any stage and bad input of
every kind, from a process of its own, against a server with 8 places to run (`benchmarks.inside`). Growth is the
slope of a line through samples, the first quarter left out, in which caches fill. Only what was provoked may fail:
bad input with 4xx, and whoever finds the server full with 503.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.aborts import STAGES, Kind, cycle, make_kinds, settings_of, stalled_server
from benchmarks.http_load import json_request, upload_request
from benchmarks.inside import InsideServer, inside
from benchmarks.report import finish

SAMPLE_S = 2.0
REQUEST_LIMIT_S = 60.0
PAUSE_S = 0.2
"""Of a client that has found the server full."""
SHARE_ABORTED = 0.3
SHARE_BAD = 0.2
MESSAGE = [{"role": "user", "content": "Hi"}]
CHAT = "/v1/chat/completions"


def bad_kinds() -> list[Kind]:
    """Requests that deserve a 4xx each."""
    garbage = {"type": "input_audio", "input_audio": {"data": "AAAA" * 1000, "format": "mp3"}}
    local = {"type": "audio_url", "audio_url": {"url": "http://169.254.169.254/latest"}}
    bodies: dict[str, Any] = {
        "no messages": {},
        "a parameter out of range": {"messages": MESSAGE, "temperature": 9},
        "a parameter that is refused": {"messages": MESSAGE, "logits_processors": [1]},
        "audio that is none": {"messages": [{"role": "user", "content": [garbage]}]},
        "a forbidden link": {"messages": [{"role": "user", "content": [local]}]},
        "a prompt beyond the context": {"messages": [{"role": "user", "content": "long " * 20_000}]},
        "a pattern that cannot be compiled": {"messages": MESSAGE, "structured_outputs": {"regex": "(a"}},
        "another model": {"messages": MESSAGE, "model": "nobody"},
    }
    kinds = [Kind(f"bad: {name}", json_request(CHAT, body)) for name, body in bodies.items()]
    return [
        *kinds,
        Kind("bad: an upload that is no audio", upload_request("/v1/audio/transcriptions", b"no audio" * 9999, {})),
        Kind("bad: a form with a wrong field", upload_request("/v1/audio/transcriptions", b"a", {"best_of": "2"})),
    ]


async def put_under_load(url: str, seconds: float, num_clients: int) -> Counter[str]:
    """Keep clients busy. -> how often each kind of request ended how."""
    rng, counts = random.Random(0), Counter[str]()
    deadline = time.monotonic() + seconds
    async with stalled_server() as (stalled, _):
        bad, kinds = bad_kinds(), make_kinds(stalled)
        good = [kind for kind in kinds if not kind.is_slow]

        async def client() -> None:
            while time.monotonic() < deadline:
                chance = rng.random()
                stage = "whole"
                if chance < SHARE_ABORTED:
                    kind, stage = rng.choice(kinds), rng.choice(STAGES[:-1])
                else:
                    kind = rng.choice(bad if chance < SHARE_ABORTED + SHARE_BAD else good)
                try:
                    async with asyncio.timeout(REQUEST_LIMIT_S):
                        outcome = await cycle(url, kind, stage, rng)
                except TimeoutError:
                    outcome = "late"
                if outcome == "503":
                    await asyncio.sleep(PAUSE_S)
                counts["aborted" if stage != "whole" else f"{kind.name}: {outcome}"] += 1

        await asyncio.gather(*(client() for _ in range(num_clients)))
    return counts


def unprovoked(counts: dict[str, int]) -> dict[str, int]:
    """What should not have happened, of `put_under_load`."""

    def is_fine(key: str) -> bool:
        kind, _, status = key.rpartition(": ")
        expected = "4" if kind.startswith("bad") else "200"
        return key == "aborted" or status == "503" or status.startswith(expected)

    return {key: count for key, count in counts.items() if not is_fine(key)}


async def sample(server: InsideServer, samples: list[dict[str, float]]) -> None:
    """Look at the server until cancelled."""
    started = time.monotonic()
    while True:
        rss, held = server.rss_mib(), server.holdings()
        samples.append(
            {
                "minutes": (time.monotonic() - started) / 60,
                "server_rss_mib": rss["server"],
                "engine_rss_mib": rss["engine"],
                "fds": held.num_fds,
                "engine_fds": held.num_engine_fds,
                "tasks": held.num_tasks,
            }
        )
        await asyncio.sleep(SAMPLE_S)


def slopes(samples: Sequence[dict[str, float]]) -> dict[str, float]:
    """Growth of each figure in a minute."""
    late = samples[len(samples) // 4 :]
    minutes = [one["minutes"] for one in late]
    names = [name for name in late[0] if name != "minutes"]
    return {name: float(np.polyfit(minutes, [one[name] for one in late], 1)[0]) for name in names}


async def measure(minutes: float, num_clients: int) -> dict[str, Any]:
    """The whole run."""
    samples: list[dict[str, float]] = []
    async with inside(settings_of(max_num_queued_reqs=num_clients // 3)) as server:
        before = server.holdings()
        sampling = asyncio.create_task(sample(server, samples))
        load = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.soak", "--url", server.url),
            *("--minutes", str(minutes), "--clients", str(num_clients)),
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await load.communicate()
        sampling.cancel()
        counts: dict[str, int] = json.loads(out.splitlines()[-1])
        left = await server.settle(before)
        server.engine.check_health()
        return {
            "minutes": minutes,
            "requests": sum(counts.values()),
            "counts": dict(sorted(counts.items())),
            "unprovoked": unprovoked(counts),
            "growth_per_minute": slopes(samples),
            "first": samples[len(samples) // 4],
            "last": samples[-1],
            "left_behind": {name: held for name, held in left.items() if name not in ("num_fds", "num_engine_fds")},
            "num_preemptions": server.engine.stats.num_preemptions,
        }


def main(argv: Sequence[str] | None = None) -> int:
    """-> 1 when something failed that was not provoked, or stayed behind."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--url", help="only be the clients, of this server")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    if args.url:
        print(json.dumps(asyncio.run(put_under_load(args.url, 60 * args.minutes, args.clients))))
        return 0
    result = asyncio.run(measure(args.minutes, args.clients))
    finish({"benchmark": "soak", **result}, args.output)
    return int(bool(result["unprovoked"] or result["left_behind"]))


if __name__ == "__main__":
    sys.exit(main())
