"""/metrics alone, on a port of its own: for a Prometheus that has no key, in a network that clients do not reach."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from server.observe.metrics import Metrics

MAX_CONNECTIONS = 16
"""More scrapers than that are a mistake."""

logger = logging.getLogger(__name__)


class _Bystander(uvicorn.Server):
    """Leaves the signals to the main server."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


@asynccontextmanager
async def metrics_served(
    metrics: Metrics, listener: socket.socket | None, config_of: Callable[..., uvicorn.Config]
) -> AsyncIterator[None]:
    """Serve them meanwhile on `listener`, which is closed at the end; without one, nothing.

    config_of: how an application is served: with the deadlines of the server's own port.
    """
    if listener is None:
        yield
        return

    async def read_metrics(request: Request) -> Response:
        text, content_type = await asyncio.to_thread(metrics.exposition, request.headers.get("accept", ""))
        return Response(text, headers={"Content-Type": content_type})

    with listener:
        app = Starlette(routes=[Route("/metrics", read_metrics)])
        server = _Bystander(config_of(app, lifespan="off", limit_concurrency=MAX_CONNECTIONS))
        serving = asyncio.create_task(server.serve([listener]))
        logger.info("metrics on port %d", listener.getsockname()[1])
        try:
            yield
        finally:
            server.should_exit = True
            await serving
