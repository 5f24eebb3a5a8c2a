"""Tympan on a Ray cluster that is there anyway: `serve run deploy.ray_serve:app`.

Settings come from the environment of the replicas (`TYMPAN_MODEL`, `TYMPAN_DEVICE` and so on; `TYMPAN_REPLICAS` and
`TYMPAN_GPUS_PER_REPLICA` are this file's own). A replica is the whole server but for the socket: its engine runs in
a process beside it, and when that dies the replica ends, which Ray replaces.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from ray import serve

from configs.command_line import load_settings
from server.__main__ import start_engine
from server.app import create_app

NUM_REPLICAS = int(os.environ.get("TYMPAN_REPLICAS", "2"))
GPUS_PER_REPLICA = float(os.environ.get("TYMPAN_GPUS_PER_REPLICA", "1"))


@asynccontextmanager
async def _running(app: FastAPI) -> AsyncIterator[None]:
    settings = load_settings([])
    engine, checkpoint = await start_engine(settings)
    inner = create_app(settings, engine, checkpoint)
    app.mount("/", inner)
    watch = asyncio.create_task(_end_with(engine))
    async with inner.router.lifespan_context(inner):
        yield
    watch.cancel()
    await engine.close()


async def _end_with(engine: object) -> None:
    await engine.wait_dead()  # type: ignore[attr-defined]
    os._exit(1)


def build() -> FastAPI:
    """The application of a replica; Ray calls it there, and runs its lifespan."""
    return FastAPI(lifespan=_running, openapi_url=None, docs_url=None, redoc_url=None)


deployment = serve.deployment(
    serve.ingress(build)(),
    name="tympan",
    num_replicas=NUM_REPLICAS,
    ray_actor_options={"num_gpus": GPUS_PER_REPLICA},
    max_ongoing_requests=256,
    graceful_shutdown_timeout_s=120,
)
app = deployment.bind()
