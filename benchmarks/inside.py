"""A server in this process, with an engine in its own: what it holds can be looked at while clients come and go.

Sockets, HTTP and the pipe are real. `Holdings` is what requests may leave behind; all of it goes back to what it was
when nobody asks for anything. That the engine still answers says that its books balance: it checks them whenever it
falls idle, and ends if they do not. Linux.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from fastapi import FastAPI

from configs.settings import Settings
from engine.client import ProcessEngineClient
from server.__main__ import start_engine
from server.app import create_app
from server.http.connection import server_config
from server.lifecycle import DrainingServer, DrainPolicy

POLL_S = 0.05


@dataclass(frozen=True)
class Holdings:
    """What is held for requests."""

    num_in_flight: int
    num_at_work: int
    num_queued_tokens: int
    num_with_engine: int
    """Requests that the client waits for."""
    num_running: int
    num_waiting: int
    kv_cache_usage: float
    num_tasks: int
    """Of the event loop."""
    num_fds: int
    num_engine_fds: int
    num_temporary_files: int


@dataclass(frozen=True)
class InsideServer:
    """A server that runs."""

    url: str
    app: FastAPI
    engine: ProcessEngineClient
    temporary: Path
    """Where its temporary files go."""

    def holdings(self) -> Holdings:
        """What it holds now; tasks and descriptors of clients in this process count."""
        traffic, stats = self.app.state.traffic, self.engine.stats
        return Holdings(
            num_in_flight=traffic.num_in_flight,
            num_at_work=traffic.num_at_work,
            num_queued_tokens=self.app.state.serving.queue.num_tokens,
            num_with_engine=self.engine.num_in_flight,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            kv_cache_usage=stats.kv_cache_usage,
            num_tasks=len(asyncio.all_tasks()),
            num_fds=psutil.Process().num_fds(),
            num_engine_fds=psutil.Process(self.engine.process.pid).num_fds(),
            num_temporary_files=len(list(self.temporary.iterdir())),
        )

    async def settle(self, before: Holdings, timeout_s: float = 20.0) -> dict[str, Any]:
        """Wait until nothing is held beyond `before`. -> what still is, as [before, now]; nothing if all is well."""
        deadline = time.monotonic() + timeout_s
        while True:
            now = asdict(self.holdings())
            left = {name: [was, now[name]] for name, was in asdict(before).items() if now[name] > was}
            if not left or time.monotonic() > deadline:
                return left
            await asyncio.sleep(POLL_S)

    def rss_mib(self) -> dict[str, float]:
        """Resident memory of both processes."""
        pids = {"server": os.getpid(), "engine": self.engine.process.pid}
        return {name: psutil.Process(pid).memory_info().rss / 2**20 for name, pid in pids.items()}


@asynccontextmanager
async def inside(settings: Settings) -> AsyncIterator[InsideServer]:
    """Serve on a free port of this machine until the context ends."""
    with tempfile.TemporaryDirectory() as folder:
        default, tempfile.tempdir = tempfile.tempdir, folder
        engine, checkpoint = await start_engine(settings)
        try:
            app = create_app(settings, engine, checkpoint)
            config = server_config(app, host="127.0.0.1", port=0, timeout_graceful_shutdown=1)
            server = DrainingServer(config, app.state.traffic, engine, DrainPolicy(0.0, 1.0))
            serving = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(POLL_S)
            port = server.servers[0].sockets[0].getsockname()[1]
            yield InsideServer(f"http://127.0.0.1:{port}", app, engine, Path(folder))
            server.should_exit = True
            await serving
        finally:
            await engine.close()
            tempfile.tempdir = default
