"""The server without a socket: an engine in its process, and the application as an HTTP client in memory sees it.

A session takes the settings of the command line. Those that only mean something to a listening server are refused
by name, or put aside where a file or the environment brings them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from configs.settings import Settings, group_of
from server.__main__ import start_engine
from server.app import create_app

SERVER_SETTINGS = frozenset(
    name for name, field in Settings.model_fields.items() if group_of(field) == "server" and name != "max_body_mb"
)
"""Settings of a server that listens."""

BASE_URL = "http://tympan/v1"
"""Reached through memory only."""

OFFLINE_TOKEN_BUDGET = 2048
"""Of a step, where the settings name none: nobody watches a token arrive, and longer steps waste less."""

AHEAD = 16
"""Requests being read and tokenized while the engine is full with others."""


@asynccontextmanager
async def in_process(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """Start an engine; a client whose every request goes to it, through the server's application.

    Raises EngineStartError and ModelError. The engine's process has ended when the context has.
    """
    budget = settings.max_num_batched_tokens or OFFLINE_TOKEN_BUDGET
    settings = settings.model_copy(update={"api_key": (), "api_key_file": None, "max_num_batched_tokens": budget})
    engine, checkpoint = await start_engine(settings)
    try:
        app = create_app(settings, engine, checkpoint)
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE_URL, timeout=None)
        async with app.router.lifespan_context(app), client:
            yield client
    finally:
        await engine.close()


def width_of(settings: Settings) -> int:
    """How many requests at once keep the engine busy."""
    return settings.max_num_seqs + AHEAD
