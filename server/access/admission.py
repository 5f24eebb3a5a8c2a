"""How much is let in: requests in flight, and prompt tokens that wait. Touched on the event loop only.

A POST has a place from its headers to the end of its answer, so that bodies, decoded audio and answers nobody reads
are bounded as well as what the engine has. There are as many places as the engine runs at once, and those of the
queue. Who finds none is told so before a byte of the body is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from server.access.held_bytes import Budget, HeldBytes, overloaded
from server.errors import shutting_down


class Traffic:
    """What is in flight, and whether more is welcome."""

    def __init__(
        self,
        max_at_work: int,
        memory: Budget | None = None,
        disk: Budget | None = None,
        audio: Budget | None = None,
    ) -> None:
        """memory, disk: of all bodies; audio: of all samples; None: no bound."""
        self.num_in_flight = 0
        """Requests of every kind, probes too."""
        self.num_at_work = 0
        """POSTs: whatever costs more than a moment."""
        self.max_at_work = max_at_work
        self.memory = memory or Budget()
        self.disk = disk or Budget()
        self.audio = audio or Budget()
        self._parsing = asyncio.Lock()
        self.is_draining = False

    def check_welcome(self) -> None:
        """Raise ApiError (503) while the server is shutting down."""
        if self.is_draining:
            raise shutting_down()

    @contextmanager
    def place(self, method: str) -> Iterator[HeldBytes]:
        """Count a request while it is served. -> what its body holds. Raises ApiError (503) when all are taken."""
        held = HeldBytes(self.memory, self.disk, self.audio, self._parsing)
        if method != "POST":
            yield held
            return
        if self.num_at_work >= self.max_at_work:
            raise overloaded(f"The server is full: it has {self.num_at_work} requests to answer.")
        self.num_at_work += 1
        try:
            yield held
        finally:
            held.release()
            self.num_at_work -= 1


@dataclass(slots=True)
class PromptQueue:
    """Prompt tokens that have been given to the engine and have brought nothing yet."""

    max_tokens: int | None = None
    """None: no bound."""
    num_tokens: int = 0

    def check_room(self, num_tokens: int) -> None:
        """Raise ApiError (503) unless so many tokens more may wait. Alone, a prompt of any length may."""
        if self.max_tokens is not None and 0 < self.num_tokens > self.max_tokens - num_tokens:
            raise overloaded(f"The server is full: prompts of {self.num_tokens} tokens wait.")

    def enter(self, num_tokens: int) -> WaitingPrompt:
        """Count a prompt until it leaves."""
        self.num_tokens += num_tokens
        return WaitingPrompt(self, num_tokens)


@dataclass(slots=True)
class WaitingPrompt:
    """A prompt's place in the queue."""

    queue: PromptQueue
    num_tokens: int

    def leave(self) -> None:
        """The engine has begun to answer, or never will. More than once is fine."""
        self.queue.num_tokens -= self.num_tokens
        self.num_tokens = 0
