"""Clients that leave, at every stage of a request, ten thousand of them: what do they leave behind? Nothing.

    python -m benchmarks.aborts [--cycles 10000] [--clients 16] [--limit 900]

Every cycle sends a request of some kind, streaming or not, and closes or resets the connection: within the head or
the body, at once after it, while its audio is fetched from a server that never answers, decoded or queued, or after
some of the answer. Afterwards all that `benchmarks.inside` can see must be what it was before.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.http_load import json_request, upload_request
from benchmarks.inside import InsideServer, inside
from benchmarks.report import finish
from configs.settings import Settings
from tympan.load import make_wav

STAGES = ("head", "body", "sent", "waiting", "answering", "whole")
MAX_WAIT_S = 0.3
"""In the stage `waiting`: decoding, queued, prefilling, decoding."""
SETTLE_S = 2.0
"""After the warm-up."""
STAGE_LIMIT_S = 300.0
"""For a cycle: a client that waits for an answer's beginning gets it, or gives up."""


@dataclass(frozen=True)
class Kind:
    """A kind of request."""

    name: str
    request: bytes
    is_slow: bool = False
    """Never answered: nobody waits for it."""


def make_kinds(stalled_url: str) -> list[Kind]:
    """One request of each kind."""
    wav = make_wav(2.0, 0)
    audio = {"type": "input_audio", "input_audio": {"data": wav, "format": "wav"}}
    stalled = {"type": "audio_url", "audio_url": {"url": f"{stalled_url}/a.wav"}}
    question = {"type": "text", "text": "What is said?"}
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    formed = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    content = base64.b64decode(wav) * 20  # more than a form keeps in memory
    path = "/v1/chat/completions"

    def chat(*parts: Any, **options: Any) -> bytes:
        messages = [{"role": "user", "content": list(parts)}]
        return json_request(path, {"messages": messages, "max_tokens": 60, "ignore_eos": True, **options})

    return [
        Kind("text", chat(question)),
        Kind("text, streamed", chat(question, stream=True)),
        Kind("audio", chat(audio, question)),
        Kind("audio, streamed", chat(audio, question, stream=True)),
        Kind("four choices, streamed", chat(question, stream=True, n=4)),
        Kind("a schema", chat(question, response_format=formed, ignore_eos=False)),
        Kind("a link that does not answer", chat(stalled, question), is_slow=True),
        Kind("a response, streamed", json_request("/v1/responses", {"input": "Hi", "stream": True})),
        Kind("a transcription", upload_request("/v1/audio/transcriptions", content, {})),
        Kind("a transcription, streamed", upload_request("/v1/audio/transcriptions", content, {"stream": "true"})),
        Kind("an upload", upload_request("/v1/files", base64.b64decode(wav), {"purpose": "user_data"})),
    ]


@asynccontextmanager
async def stalled_server() -> AsyncIterator[tuple[str, set[asyncio.StreamWriter]]]:
    """A web server that never answers. -> its address, and its open connections."""
    connections: set[asyncio.StreamWriter] = set()

    async def stall(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(writer)
        try:
            while await reader.read(1 << 16):
                pass
        except ConnectionError:
            pass
        finally:
            connections.discard(writer)
            writer.close()

    server = await asyncio.start_server(stall, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", connections


async def cycle(url: str, kind: Kind, stage: str, rng: random.Random) -> str:
    """One client. -> how it went: "left", or the status of an answer it had the whole of."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        head_end = kind.request.index(b"\r\n\r\n") + 4
        if stage == "head":
            writer.write(kind.request[: rng.randrange(1, head_end)])
        elif stage == "body":
            writer.write(kind.request[: rng.randrange(head_end, len(kind.request))])
            await asyncio.sleep(rng.random() * 0.02)
        else:
            writer.write(kind.request)
        await writer.drain()
        if stage == "waiting" or kind.is_slow:
            await asyncio.sleep(rng.random() * MAX_WAIT_S)
        elif stage == "answering":
            await reader.read(1)
            await reader.read(rng.randrange(1, 2000))
        elif stage == "whole":
            status = (await reader.readline()).split()[1].decode()
            while await reader.read(1 << 16):
                pass
            return status
    except ConnectionError:
        return "cut"
    finally:
        if rng.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()
    return "left"


async def run(server: InsideServer, stalled: str, num_cycles: int, num_clients: int, limit_s: float) -> Counter[str]:
    """-> how many cycles there were, and how many of each stage and outcome."""
    rng = random.Random(0)
    kinds, counts = make_kinds(stalled), Counter[str]()
    deadline = time.monotonic() + limit_s
    numbers = iter(range(num_cycles))

    async def client() -> None:
        for number in numbers:
            if time.monotonic() > deadline:
                return
            kind, stage = kinds[number % len(kinds)], rng.choice(STAGES)
            async with asyncio.timeout(STAGE_LIMIT_S):
                outcome = await cycle(server.url, kind, stage, rng)
            counts.update(["cycles", f"{stage}: {outcome}"])

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return counts


async def measure(settings: Settings, num_cycles: int, num_clients: int, limit_s: float = 600.0) -> dict[str, Any]:
    """Warm up, note what is held, let clients leave. -> what was done, and what is held beyond that."""
    async with stalled_server() as (stalled, connections), inside(settings) as server:
        warm_up = await run(server, stalled, 10 * num_clients, num_clients, limit_s)
        await asyncio.sleep(SETTLE_S)
        before, rss_before = server.holdings(), server.rss_mib()
        started = time.perf_counter()
        counts = await run(server, stalled, num_cycles, num_clients, limit_s)
        seconds = time.perf_counter() - started
        left = await server.settle(before)
        if connections:
            left["num_fetches"] = [0, len(connections)]
        server.engine.check_health()
        last = await cycle(server.url, make_kinds(stalled)[0], "whole", random.Random(1))
        return {
            "counts": dict(counts),
            "warm_up": warm_up["cycles"],
            "seconds": seconds,
            "left_behind": left,
            "rss_mib": {"before": rss_before, "after": server.rss_mib()},
            "served_after": last == "200",
        }


def settings_of(checkpoint: str | None = None, **changes: Any) -> Settings:
    """A server small enough to be full, with links to this machine allowed."""
    return Settings(
        model=checkpoint, max_num_seqs=8, max_model_len=1024, allowed_private_media_hosts=("127.0.0.1",), **changes
    )


def main(argv: Sequence[str] | None = None) -> int:
    """-> 1 when something stayed behind."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cycles", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--limit", type=float, default=900, help="most seconds")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    result = asyncio.run(measure(settings_of(), args.cycles, args.clients, args.limit))
    finish({"benchmark": "aborts", **result}, args.output)
    return int(bool(result["left_behind"]) or not result["served_after"])


if __name__ == "__main__":
    sys.exit(main())
