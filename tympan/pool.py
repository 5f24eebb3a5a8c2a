"""Many items, so many at a time: what keeps a batch wide and its memory bounded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def run_pool(items: AsyncIterator[T], work: Callable[[T], Awaitable[None]], concurrency: int) -> None:
    """Do `work` on each item, on at most `concurrency` at once. An item is not drawn before its turn.

    The first exception cancels the rest and is raised.
    """
    turn = asyncio.Lock()
    end = object()

    async def worker() -> None:
        while True:
            async with turn:
                item = await anext(items, end)
            if item is end:
                return
            await work(item)  # type: ignore[arg-type]
            del item  # not to be kept while waiting for the next turn

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker())
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
