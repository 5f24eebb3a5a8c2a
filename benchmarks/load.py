"""A load generator for any OpenAI-compatible server that takes audio.

    python -m benchmarks.load --url http://127.0.0.1:8000 --concurrency 16 --requests 64          closed loop
    python -m benchmarks.load --url http://127.0.0.1:8000 --rate 4 --requests 64                  open loop

Closed: so many clients, each sends its next request when the last has ended. Open: requests arrive at `--rate` a
second (Poisson) whatever the server does, which is how real users behave and where queues show. Every request
streams, brings a clip of its own (so no cache helps) and asks for exactly `--output-tokens` tokens by the
extensions that vLLM, SGLang and Tympan share (ignore_eos, min_tokens).

TTFT is from the first byte of the request to the first token, inter-token latency between a request's chunks,
end-to-end to the end of the stream; what lies between the first token and the end, shared among the other tokens, is
the time per output token. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import soundfile
from tqdm import tqdm

from benchmarks.report import finish, percentiles

QUESTION = "What does the person say? Please transcribe."


@dataclass
class Outcome:
    """One request, times in seconds."""

    clip_seconds: float
    ttft: float = 0.0
    end_to_end: float = 0.0
    gaps: list[float] = field(default_factory=list)
    num_tokens: int = 0
    prompt_tokens: int = 0
    error: str | None = None

    @property
    def time_per_output_token(self) -> float:
        """Of the tokens after the first; chunks may hold several."""
        return (self.end_to_end - self.ttft) / max(1, self.num_tokens - 1)


def make_wav(seconds: float, seed: int) -> str:
    """A clip of noise as base64 WAV; no two seeds alike."""
    samples = np.random.default_rng(seed).standard_normal(int(seconds * 16000)) * 0.1
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.astype(np.float32), 16000, format="WAV", subtype="PCM_16")
    return base64.b64encode(buffer.getvalue()).decode()


def make_body(args: argparse.Namespace, wav: str) -> bytes:
    """A chat completion with one clip."""
    return json.dumps(
        {
            "model": args.model,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "input_audio", "input_audio": {"data": wav, "format": "wav"}},
                        {"type": "text", "text": QUESTION},
                    ],
                }
            ],
            "temperature": 0,
            "max_tokens": args.output_tokens,
            "min_tokens": args.output_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()


async def send(client: httpx.AsyncClient, body: bytes, outcome: Outcome) -> Outcome:
    """Send one request and time its stream."""
    started = last = time.perf_counter()
    try:
        headers = {"content-type": "application/json"}
        async with client.stream("POST", "/v1/chat/completions", content=body, headers=headers) as response:
            if response.status_code != 200:
                outcome.error = f"HTTP {response.status_code}: {(await response.aread())[:200]!r}"
                return outcome
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event, now = json.loads(line[6:]), time.perf_counter()
                if event.get("error"):
                    outcome.error = str(event["error"])
                    return outcome
                if usage := event.get("usage"):
                    outcome.num_tokens, outcome.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
                if any("role" not in choice["delta"] for choice in event["choices"]):  # not the opening chunk
                    if outcome.ttft:
                        outcome.gaps.append(now - last)
                    outcome.ttft = outcome.ttft or now - started
                    last = now
        outcome.end_to_end = time.perf_counter() - started
    except (httpx.HTTPError, ValueError, KeyError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    return outcome


async def closed_loop(count: int, concurrency: int, one: Callable[[int], Awaitable[None]]) -> None:
    """`concurrency` clients that take the next request as soon as they are free."""
    numbers = iter(range(count))

    async def client() -> None:
        for number in numbers:
            await one(number)

    await asyncio.gather(*(client() for _ in range(concurrency)))


async def open_loop(count: int, rate: float, seed: int, one: Callable[[int], Awaitable[None]]) -> None:
    """Poisson arrivals of `rate` a second."""
    generator = random.Random(seed)
    tasks = []
    for number in range(count):
        tasks.append(asyncio.create_task(one(number)))
        await asyncio.sleep(generator.expovariate(rate))
    await asyncio.gather(*tasks)


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Warm up, run, summarise."""
    headers = {"authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=args.url, headers=headers, timeout=args.timeout, limits=limits) as client:
        if args.model is None:
            args.model = (await client.get("/v1/models")).json()["data"][0]["id"]
        bodies = [
            make_body(args, make_wav(args.clip_seconds, args.seed + number))
            for number in range(args.requests + args.warmup)
        ]
        for body in bodies[args.requests :]:
            await send(client, body, Outcome(args.clip_seconds))
        outcomes: list[Outcome] = []
        progress = tqdm(total=args.requests, desc="requests", unit="req")

        async def one(number: int) -> None:
            outcomes.append(await send(client, bodies[number], Outcome(args.clip_seconds)))
            progress.update()

        started = time.perf_counter()
        if args.rate:
            await open_loop(args.requests, args.rate, args.seed, one)
        else:
            await closed_loop(args.requests, args.concurrency, one)
        wall = time.perf_counter() - started
        progress.close()
    return summarise(args, outcomes, wall)


def summarise(args: argparse.Namespace, outcomes: list[Outcome], wall: float) -> dict[str, Any]:
    """The figures of one run."""
    good = [outcome for outcome in outcomes if outcome.error is None]
    return {
        "benchmark": "load",
        "loop": {"open_rate": args.rate} if args.rate else {"closed_concurrency": args.concurrency},
        "model": args.model,
        "clip_seconds": args.clip_seconds,
        "output_tokens": args.output_tokens,
        "requests": len(outcomes),
        "errors": [outcome.error for outcome in outcomes if outcome.error][:5],
        "num_errors": len(outcomes) - len(good),
        "wall_s": wall,
        "requests_per_s": len(good) / wall,
        "output_tokens_per_s": sum(outcome.num_tokens for outcome in good) / wall,
        "audio_seconds_per_s": sum(outcome.clip_seconds for outcome in good) / wall,
        "ttft_s": percentiles([outcome.ttft for outcome in good]),
        "prompt_tokens": sum(outcome.prompt_tokens for outcome in good) / max(1, len(good)),
        "time_per_output_token_s": percentiles([outcome.time_per_output_token for outcome in good]),
        "inter_token_latency_s": percentiles([gap for outcome in good for gap in outcome.gaps]),
        "end_to_end_s": percentiles([outcome.end_to_end for outcome in good]),
    }


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


def main() -> None:
    """Measure as the command line says."""
    args = parse()
    finish(asyncio.run(measure(args)), args.output)


if __name__ == "__main__":
    main()
