"""A batch at work: lines in, so many requests at once, results out as they finish.

Memory holds the requests in flight, bounded in number and in bytes, and the custom_ids. A failure of one line is a
result; only a target that is gone, or stays away, ends the run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tympan.batch_files import BatchRequest, LineError, ResultFile, count_requests, read_requests
from tympan.pool import run_pool
from tympan.progress import Progress

MAX_BYTES_IN_FLIGHT = 256 << 20
"""Of request bodies; a single larger one goes alone."""
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 8.0
_BUSY = (429, 503)


class BatchStopped(Exception):
    """Nobody answers any more: what is left would fail for no fault of its own."""


@dataclass(frozen=True, slots=True)
class Target:
    """Who answers."""

    client: httpx.AsyncClient
    """Its base URL ends in /v1."""
    concurrency: int
    max_body_bytes: int
    patience_s: float = 0.0
    """How long to try again when it is away (503, no connection) or busy (429)."""


@dataclass(slots=True)
class Outcome:
    """Of one run."""

    num_answered: int = 0
    num_failed: int = 0


class ByteBudget:
    """Bounds what is in flight. Touched on the event loop only."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._freed = asyncio.Condition()

    async def take(self, size: int) -> None:
        """Wait until there is room: always, when nothing else is held."""
        async with self._freed:
            await self._freed.wait_for(lambda: not self._held or self._held + size <= self._limit)
            self._held += size

    async def give(self, size: int) -> None:
        """Give room back."""
        async with self._freed:
            self._held -= size
            self._freed.notify_all()


async def run_batch(target: Target, requests: Path, results: ResultFile, *, shown: bool | None = None) -> Outcome:
    """Do every line that has no answer yet. `shown`: the progress bar, None for on a terminal only.

    Raises OSError and BatchStopped; what was written stays.
    """
    outcome = Outcome()
    budget = ByteBudget(MAX_BYTES_IN_FLIGHT)
    total = await asyncio.to_thread(count_requests, requests)
    bar = Progress(total, done=min(len(results.answered), total), shown=shown)

    async def work(item: BatchRequest | LineError) -> None:
        try:
            response = None if isinstance(item, LineError) else await _send(target, item)
        finally:
            await budget.give(item.size)
        if isinstance(item, LineError):
            results.write(item.custom_id, error=item.to_json())
        else:
            results.write(item.custom_id, response=response)
        is_answer = response is not None and response["status_code"] == 200
        outcome.num_answered += is_answer
        outcome.num_failed += not is_answer
        bar.advance(response["body"] if response is not None and is_answer else None)

    try:
        await run_pool(_items(requests, results.answered, target, budget), work, target.concurrency)
    finally:
        bar.close()
    return outcome


async def _items(
    path: Path, answered: set[str], target: Target, budget: ByteBudget
) -> AsyncIterator[BatchRequest | LineError]:
    """Lines as there is room for them, read and parsed in one worker thread: each thread keeps memory of its own."""
    loop = asyncio.get_running_loop()
    with path.open("rb") as file, ThreadPoolExecutor(1, thread_name_prefix="requests") as reader:
        requests = read_requests(file, answered, target.max_body_bytes)
        while (item := await loop.run_in_executor(reader, next, requests, None)) is not None:
            await budget.take(item.size)
            yield item


async def _send(target: Target, request: BatchRequest) -> dict[str, Any]:
    """The response to one request, of whatever status. Raises BatchStopped."""
    deadline = time.monotonic() + target.patience_s
    wait_s = FIRST_WAIT_SECONDS
    while True:
        response: httpx.Response | None = None
        reason = "the engine is gone"
        try:
            response = await target.client.post(
                request.url.removeprefix("/v1"),
                content=request.body,
                headers={"Content-Type": "application/json"},
            )
        except httpx.TransportError as error:
            reason = f"the server cannot be reached ({type(error).__name__})"
        if response is not None and response.status_code not in _BUSY:
            return _response(response)
        wait_s = min(max(wait_s, _retry_after(response)), LONGEST_WAIT_SECONDS)
        if time.monotonic() + wait_s > deadline:
            if response is not None and response.status_code == httpx.codes.TOO_MANY_REQUESTS:
                return _response(response)
            raise BatchStopped(reason)
        await asyncio.sleep(wait_s)
        wait_s *= 2


def _retry_after(response: httpx.Response | None) -> float:
    value = "" if response is None else response.headers.get("retry-after", "")
    return float(value) if value.isdecimal() else 0.0


def _response(response: httpx.Response) -> dict[str, Any]:
    """As a result holds it. A proxy's answer that is no JSON is told as a message."""
    try:
        body = response.json()
    except ValueError:
        body = {"error": {"message": response.text[:500], "type": "server_error", "param": None, "code": None}}
    return {
        "status_code": response.status_code,
        "request_id": response.headers.get("x-request-id", ""),
        "body": body,
    }
