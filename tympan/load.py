"""Load on any OpenAI-compatible server that takes audio, and what its users get of it.

Closed loop: so many clients, each sends its next request when the last has ended. Open loop: requests arrive at a
rate (Poisson) whatever the server does, which is how real users behave and where queues show. Every request streams,
brings a clip of its own (so no cache helps) and asks for an exact number of tokens by the extensions that vLLM,
SGLang and Tympan share (ignore_eos, min_tokens).

TTFT is from the first byte of the request to the first token, inter-token latency between a request's chunks,
end-to-end to the end of the stream; what lies between the first token and the end, shared among the other tokens, is
the time per output token.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import soundfile

QUESTION = "What does the person say? Please transcribe."


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What to send."""

    url: str = "http://127.0.0.1:8000/v1"
    model: str | None = None
    """None: the first that the server lists."""
    api_key: str | None = None
    requests: int = 64
    warmup: int = 2
    """Requests before those that count, one at a time."""
    concurrency: int = 16
    """Clients of the closed loop."""
    rate: float | None = None
    """Arrivals a second of an open loop; None: closed."""
    clip_seconds: float = 10.0
    output_tokens: int = 64
    timeout: float = 600.0
    seed: int = 0


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


def make_body(plan: LoadPlan, model: str, wav: str) -> bytes:
    """A chat completion with one clip."""
    return json.dumps(
        {
            "model": model,
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
            "max_tokens": plan.output_tokens,
            "min_tokens": plan.output_tokens,
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
        async with client.stream("POST", "chat/completions", content=body, headers=headers) as response:
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


async def closed_loop(count: int, concurrency: int, one: Callable[[int], Coroutine[Any, Any, None]]) -> None:
    """`concurrency` clients that take the next request as soon as they are free."""
    numbers = iter(range(count))

    async def client() -> None:
        for number in numbers:
            await one(number)

    await asyncio.gather(*(client() for _ in range(concurrency)))


async def open_loop(count: int, rate: float, seed: int, one: Callable[[int], Coroutine[Any, Any, None]]) -> None:
    """Poisson arrivals of `rate` a second."""
    generator = random.Random(seed)
    tasks = []
    for number in range(count):
        tasks.append(asyncio.create_task(one(number)))
        await asyncio.sleep(generator.expovariate(rate))
    await asyncio.gather(*tasks)


async def measure(plan: LoadPlan, on_done: Callable[[Outcome], object] = lambda _: None) -> dict[str, Any]:
    """Warm up, run, summarise. Raises httpx.HTTPError when the server cannot be asked for its model."""
    headers = {"authorization": f"Bearer {plan.api_key}"} if plan.api_key else {}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=plan.url, headers=headers, timeout=plan.timeout, limits=limits) as client:
        model = plan.model or await _first_model(client)
        count = plan.requests + plan.warmup
        bodies = [make_body(plan, model, make_wav(plan.clip_seconds, plan.seed + n)) for n in range(count)]
        for body in bodies[plan.requests :]:
            await send(client, body, Outcome(plan.clip_seconds))
        outcomes: list[Outcome] = []

        async def one(number: int) -> None:
            outcomes.append(await send(client, bodies[number], Outcome(plan.clip_seconds)))
            on_done(outcomes[-1])

        started = time.perf_counter()
        if plan.rate:
            await open_loop(plan.requests, plan.rate, plan.seed, one)
        else:
            await closed_loop(plan.requests, plan.concurrency, one)
        wall = time.perf_counter() - started
    return summarise(plan, model, outcomes, wall)


async def _first_model(client: httpx.AsyncClient) -> str:
    response = (await client.get("models")).raise_for_status()
    return str(response.json()["data"][0]["id"])


def summarise(plan: LoadPlan, model: str, outcomes: list[Outcome], wall: float) -> dict[str, Any]:
    """The figures of one run."""
    good = [outcome for outcome in outcomes if outcome.error is None]
    return {
        "benchmark": "load",
        "loop": {"open_rate": plan.rate} if plan.rate else {"closed_concurrency": plan.concurrency},
        "model": model,
        "clip_seconds": plan.clip_seconds,
        "output_tokens": plan.output_tokens,
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


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p95, p99 by nearest rank, and the mean."""
    if not values:
        return {"mean": None, "p50": None, "p95": None, "p99": None}
    ordered = sorted(values)
    ranks = {f"p{p}": ordered[min(len(ordered) - 1, round(p / 100 * (len(ordered) - 1)))] for p in (50, 95, 99)}
    return {"mean": sum(ordered) / len(ordered), **ranks}
