"""An async generator run by a task of its own, so that a reader can wait for it with a timeout.

A timeout on the generator itself would cancel what it waits for. Closing the channel closes the generator, in
its own task, so that its clean-up runs whole even when the reader was cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _End:
    failure: Exception | None


class Channel(Generic[T]):
    """Reads ahead: the queue has no bound, since answers have one."""

    def __init__(self, source: AsyncGenerator[T, None]) -> None:
        """Start the source. Needs a running loop."""
        self._queue: asyncio.Queue[T | _End] = asyncio.Queue()
        self._first: T | None = None
        self._task = asyncio.create_task(self._pump(source))

    async def wait_begun(self, timeout_s: float | None) -> None:
        """Wait for the first item, which `get` will return, or for the timeout. Raises the source's failure."""
        with suppress(TimeoutError):
            self._first = await self.get(timeout_s)

    async def get(self, timeout_s: float | None) -> T:
        """The next item. Raises TimeoutError, StopAsyncIteration at the end, or the source's failure."""
        if self._first is not None:
            first, self._first = self._first, None
            return first
        async with asyncio.timeout(timeout_s):
            item = await self._queue.get()
        if isinstance(item, _End):
            self._queue.put_nowait(item)
            raise item.failure or StopAsyncIteration
        return item

    async def aclose(self) -> None:
        """Close the source, wherever it is."""
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _pump(self, source: AsyncGenerator[T, None]) -> None:
        failure = None
        try:
            async with aclosing(source):
                async for item in source:
                    self._queue.put_nowait(item)
        except Exception as error:
            failure = error
        finally:
            self._queue.put_nowait(_End(failure))
