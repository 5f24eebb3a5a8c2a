"""An engine that answers at once, and a server round it: what is left is the front's own work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from multiprocessing.connection import Connection

import uvicorn

from configs.settings import Settings
from engine.messages import EngineInfo, EngineOutput, EngineRequest, EngineStats, FinishReason
from server.__main__ import BUNDLED_CHECKPOINT
from server.app import create_app


class NullEngineClient:
    """An EngineClient whose every answer is one token, without a pipe, a model or a wait."""

    def __init__(self) -> None:
        self.info = EngineInfo(8192, 1536, "none", "none", "", "none", "", 0, 16, 64, 512, "", 0.0)
        self.stats = EngineStats()

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """One token, at once."""
        for index in range(request.n):
            yield EngineOutput(request.request_id, (5,), finish_reason=FinishReason.LENGTH, index=index)

    def end_choice(self, request_id: str, index: int) -> None:
        """Nothing runs."""

    def check_health(self) -> None:
        """Always well."""

    async def wait_dead(self) -> str:
        """Never returns."""
        return await asyncio.get_running_loop().create_future()

    async def close(self) -> None:
        """Nothing to stop."""


def serve(parent: Connection, settings: Settings | None = None) -> None:
    """In a process of its own: the real application on a free port, which is sent, until the parent says a word."""
    asyncio.run(_serve(parent, settings or Settings()))


async def _serve(parent: Connection, settings: Settings) -> None:
    app = create_app(settings, NullEngineClient(), BUNDLED_CHECKPOINT)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    parent.send(server.servers[0].sockets[0].getsockname()[1])
    await asyncio.to_thread(parent.recv)
    server.should_exit = True
    await serving
