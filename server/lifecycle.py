"""The life of the HTTP server: it serves, it drains, it ends.

    SIGTERM, SIGINT   stop welcoming requests, let those in flight finish, end with status 0
    a second signal   end at once
    the engine died   its requests get their 503, then end with status 1

While draining the socket stays open, so that balancers see /ready turn 503 and new requests get a proper answer.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from engine.client import EngineClient
from server.middleware import Traffic

POLL_SECONDS = 0.05
AFTER_ENGINE_DEATH_SECONDS = 5.0
"""For the error answers to go out."""
LAST_WORDS_SECONDS = 2
"""What uvicorn gives connections that are still open at the end."""

logger = logging.getLogger(__name__)


class DrainingServer(uvicorn.Server):
    """A uvicorn server that finishes what it has begun."""

    def __init__(self, config: uvicorn.Config, traffic: Traffic, shutdown_timeout_s: float) -> None:
        super().__init__(config)
        self._traffic = traffic
        self._shutdown_timeout_s = shutdown_timeout_s
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
            loop.call_soon_threadsafe(self._begin_end, self._shutdown_timeout_s)

    def end_after_engine_death(self) -> None:
        """End as soon as the requests in flight have been told."""
        self._traffic.is_draining = True
        self._begin_end(AFTER_ENGINE_DEATH_SECONDS)

    def _begin_end(self, timeout_s: float) -> None:
        self._ending = asyncio.create_task(self._end(timeout_s))

    async def _end(self, timeout_s: float) -> None:
        logger.info("finishing %d requests, for at most %g s", self._traffic.num_in_flight, timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                while self._traffic.num_in_flight:
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            logger.warning("%d requests did not finish in time", self._traffic.num_in_flight)
        self.should_exit = True


async def serve_until_end(
    app: FastAPI, engine: EngineClient, config: uvicorn.Config, listener: socket.socket, shutdown_timeout_s: float
) -> str:
    """Serve until told to stop, or until the engine dies. -> why the engine died, empty if it did not."""
    server = DrainingServer(config, app.state.traffic, shutdown_timeout_s)
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
