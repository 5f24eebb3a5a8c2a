"""Requests all at once through the engine's client, in a process of its own as in production: no HTTP, no text.

Each request brings a clip that nobody has seen and gets exactly as many tokens as it asks for.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.engine_load import clip_request, engine_args
from benchmarks.gpu.journal import Journal, Unavailable
from benchmarks.gpu.shapes import Shape
from engine.client import ProcessEngineClient
from engine.errors import EngineStartError
from engine.messages import EngineRequest

WARM_UP_REQUESTS = 4
TOKEN_BUDGET = 2048
"""Of a step: the setting for throughput."""


def run(journal: Journal, shape: Shape, device: torch.device, folder: Path) -> None:
    """A cell for each number of sequences at once."""
    for sequences in shape.sequences:
        journal.cell(f"{sequences} at once", lambda n=sequences: asyncio.run(measure(shape, device, folder, n)))


async def measure(shape: Shape, device: torch.device, folder: Path, sequences: int) -> dict[str, Any]:
    """One life of an engine. Raises Unavailable when it does not start."""
    args = engine_args(
        folder,
        device,
        max_num_seqs=sequences,
        max_num_batched_tokens=TOKEN_BUDGET,
        max_model_len=2 * (shape.prompt_tokens + shape.output_tokens),
    )
    try:
        client = await ProcessEngineClient.start(args)
    except EngineStartError as error:
        raise Unavailable(f"the engine does not start: {error}") from error
    try:
        await together(client, requests(shape, WARM_UP_REQUESTS))
        measured = requests(shape, shape.requests)
        started = time.perf_counter()
        first = await together(client, measured)
        wall_s = time.perf_counter() - started
    finally:
        await client.close()
    return {
        "requests": shape.requests,
        "prompt_tokens": len(measured[0].prompt_token_ids),
        "output_tokens": shape.output_tokens,
        "wall_s": wall_s,
        "requests_per_s": shape.requests / wall_s,
        "output_tokens_per_s": shape.requests * shape.output_tokens / wall_s,
        "ttft_s": statistics.median(first) - started,
        "num_blocks": client.info.num_blocks,
        "attention_backend": client.info.attention_backend,
    }


def requests(shape: Shape, count: int) -> list[EngineRequest]:
    """All different."""
    size = (shape.prompt_clip_seconds, shape.prompt_tokens, shape.output_tokens)
    return [clip_request(shape, *size) for _ in range(count)]


async def together(client: ProcessEngineClient, wanted: list[EngineRequest]) -> list[float]:
    """-> when each got its first token. Raises RuntimeError if one is answered short."""
    return await asyncio.gather(*(_one(client, request) for request in wanted))


async def _one(client: ProcessEngineClient, request: EngineRequest) -> float:
    first, received = 0.0, 0
    async for output in client.generate(request):
        first = first or time.perf_counter()
        received += len(output.new_token_ids)
    if received != request.sampling.max_tokens:
        raise RuntimeError(f"{received} of {request.sampling.max_tokens} tokens came")
    return first
