"""The server's application in memory, for commands that do without a server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import httpx

from engine.errors import EngineStartError
from model.errors import ModelError
from tympan.cli.errors import CommandError
from tympan.cli.settings import load
from tympan.session import in_process


@asynccontextmanager
async def client(arguments: Sequence[str], max_upload_mb: float) -> AsyncIterator[httpx.AsyncClient]:
    """With the settings of `tympan serve`, but for the largest upload. Raises CommandError."""
    settings = load(arguments, "tympan transcribe")
    settings = settings.model_copy(update={"max_upload_mb": max(settings.max_upload_mb, max_upload_mb)})
    try:
        async with in_process(settings) as connected:
            yield connected
    except (EngineStartError, ModelError) as error:
        raise CommandError(f"the engine cannot start: {error}") from None
