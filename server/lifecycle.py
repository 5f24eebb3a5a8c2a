"""The life of the HTTP server: it serves, it drains, it ends.

    SIGTERM           stop welcoming requests, let those in flight finish, tell those that do not; end with status 0,
                      not before a grace in which balancers see that the server is about to end
    SIGINT            the same without the grace: a person waits
    a second signal   end at once
    an engine lost    for good: its requests get their 503, then end with status 1

While draining the socket stays open, so that balancers see /ready turn 503 and new requests get a proper answer.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

import uvicorn
from fastapi import FastAPI

from engine.client import EngineClient
from server.access.admission import Traffic

POLL_SECONDS = 0.05
LAST_ANSWERS_SECONDS = 5.0
"""For the error answers of an engine that has ended to go out."""
LAST_WORDS_SECONDS = 2
"""What uvicorn gives connections that are still open at the end."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DrainPolicy:
    """How long an end may take."""

    grace_s: float = 0.0
    """From SIGTERM on the server answers at least so long, be it only that it is shutting down."""
    timeout_s: float = 120.0
    """For requests in flight to finish."""


class DrainingServer(uvicorn.Server):
    """A uvicorn server that finishes what it has begun."""

    def __init__(self, config: uvicorn.Config, traffic: Traffic, engine: EngineClient, policy: DrainPolicy) -> None:
        super().__init__(config)
        self._traffic = traffic
        self._engine = engine
        self._policy = policy
        self._ending: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Called by the signal handlers. Signals are not raised again at the end: a drained exit is a success."""
        if self._traffic.is_draining:
            self.should_exit = self.force_exit = True
            return
        self._traffic.is_draining = True
        loop = self.servers[0].get_loop() if self.servers else None
        if loop is None:
            self.should_exit = True  # still starting: there is nothing to drain
        else:
            grace_s = 0.0 if sig == signal.SIGINT else self._policy.grace_s
            loop.call_soon_threadsafe(self._begin_end, grace_s, self._policy.timeout_s)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's, after which the application ends in order even when it has to at once."""
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves it to be cancelled, which shows a traceback
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORDS_SECONDS):
                    await self.lifespan.shutdown()

    def end_after_engine_death(self) -> None:
        """End as soon as the requests in flight have been told."""
        self._traffic.is_draining = True
        self._begin_end(0.0, LAST_ANSWERS_SECONDS)

    def _begin_end(self, grace_s: float, timeout_s: float) -> None:
        self._ending = asyncio.create_task(self._end(grace_s, timeout_s))

    async def _end(self, grace_s: float, timeout_s: float) -> None:
        logger.info("finishing %d requests, for at most %g s", self._traffic.num_in_flight, timeout_s)
        grace = asyncio.create_task(asyncio.sleep(grace_s))
        if not await self._finish(timeout_s):
            logger.warning("%d requests did not finish in time", self._traffic.num_in_flight)
            closing = asyncio.create_task(self._engine.close())  # which tells them
            await self._finish(LAST_ANSWERS_SECONDS)
            with suppress(Exception):
                await closing
        await grace
        self.should_exit = True

    async def _finish(self, timeout_s: float) -> bool:
        """-> whether no request is in flight any more."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._traffic.num_in_flight:
                    await asyncio.sleep(POLL_SECONDS)
        return not self._traffic.num_in_flight


async def serve_until_end(
    app: FastAPI, engine: EngineClient, config: uvicorn.Config, listener: socket.socket, policy: DrainPolicy
) -> str:
    """Serve until told to stop, or until the engine is dead for good. -> why it is, empty if it is not."""
    server = DrainingServer(config, app.state.traffic, engine, policy)
    serving = asyncio.create_task(server.serve([listener]))
    death = asyncio.create_task(engine.wait_dead())
    await asyncio.wait({serving, death}, return_when=asyncio.FIRST_COMPLETED)
    cause = ""
    if death.done() and not serving.done():
        cause = death.result() or "unknown"
        logger.error("the engine has died: %s", cause)
        server.end_after_engine_death()
    death.cancel()
    await serving
    return cause
