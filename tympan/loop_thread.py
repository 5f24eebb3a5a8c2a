"""An event loop in a thread of its own: asynchronous work for callers that wait.

Works the same in a script and where a loop already runs, as in a notebook. Ctrl-C in the caller's thread cancels
the work, waits for it to unwind, and goes on as KeyboardInterrupt.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines until closed. The thread is a daemon: it never keeps a program alive."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True, name="tympan")
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for `work`. Not for the loop's own thread."""
        started: Future[asyncio.Task[T]] = Future()
        ended = threading.Event()

        def begin() -> None:
            task = self._loop.create_task(work)
            task.add_done_callback(lambda _: ended.set())
            started.set_result(task)

        self._loop.call_soon_threadsafe(begin)
        try:
            ended.wait()
        except BaseException:
            self._loop.call_soon_threadsafe(started.result().cancel)
            ended.wait()
            raise
        return started.result().result()

    def end_with(self, work: Coroutine[Any, Any, None]) -> None:
        """Do `work` as the last thing, then close. Does not wait: a finalizer may run in any thread."""

        def begin() -> None:
            self._loop.create_task(work).add_done_callback(lambda _: self._loop.stop())

        self._loop.call_soon_threadsafe(begin)

    def join(self) -> None:
        """Wait for the thread to have ended."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()
