"""An engine that is started again when it dies or hangs: an `EngineClient` that has one process after another.

    serving ──died, or silent while it has work──▶ restarting ──ready──▶ serving
                                                       └──too often──▶ dead for good: `wait_dead` returns

What was in flight ends with EngineDeadError at once, and so does what comes while there is none: no request
is run twice. The pauses between starts double until an engine has finished a request. What an engine keeps (blocks,
encoded clips, matchers of grammars) is gone with it, and nothing outside names any of it. Torch-free.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Self

from engine.client import ProcessEngineClient
from engine.errors import EngineClosedError, EngineDeadError, EngineRestartingError, EngineStartError
from engine.messages import EngineInfo, EngineOutput, EngineRequest, EngineStats

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
"""Before a start."""
WINDOW_SECONDS = 600.0
"""In which restarts are counted."""
WATCH_SECONDS = 1.0
"""Between two looks at an engine that may hang."""
STILL_LIMIT_SECONDS = 3.0
"""How long an engine with work may be silent and do nothing at all, not even compute."""
SHORTEST_START_LIMIT_SECONDS = 300.0
START_LIMIT_FACTOR = 5.0
"""How long a start may take: so many times as long as the first one did, or the shortest limit."""

logger = logging.getLogger(__name__)

Start = Callable[[], Awaitable[ProcessEngineClient]]


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When an engine is given up."""

    max_restarts: int = 5
    """In WINDOW_SECONDS; failed attempts count. 0: the first death is the last."""
    hang_timeout_s: float = 300.0
    """Silence of an engine with work after which it is killed: longer than any step takes. 0: never."""


class SupervisedEngineClient:
    """Serves with whatever engine is alive. See EngineClient for the methods."""

    def __init__(self, client: ProcessEngineClient, start: Start, policy: RestartPolicy) -> None:
        """`client` has just been made by `start`. Needs a running loop."""
        self._client = client
        self._start = start
        self._policy = policy
        self._is_restarting = False
        self._is_closed = False
        self._dead: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._restarts: deque[float] = deque()
        """When they were begun, the last WINDOW_SECONDS of them."""
        self.num_restarts = 0
        """Since the start."""
        self.on_restart: Callable[[], None] = lambda: None
        """Called as one is begun."""
        self._supervision = asyncio.create_task(self._supervise())

    @classmethod
    async def launch(cls, start: Start, policy: RestartPolicy) -> Self:
        """Start the first engine. Raises EngineStartError: a server that never served is not tried again."""
        return cls(await start(), start, policy)

    @property
    def info(self) -> EngineInfo:
        """Facts about the engine, the last one while there is none."""
        return self._client.info

    @property
    def stats(self) -> EngineStats:
        """The latest snapshot: counters begin anew with an engine."""
        return EngineStats() if self._is_restarting else self._client.stats

    def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """Run a request on the engine of this moment; it ends with that engine."""
        return self._client.generate(request)

    def end_choice(self, request_id: str, index: int) -> None:
        """Stop one choice of a request in flight."""
        self._client.end_choice(request_id, index)

    def check_health(self) -> None:
        """Raises EngineRestartingError while a new engine is on its way, EngineDeadError when none is."""
        if self._is_closed:
            raise EngineClosedError("the engine was closed")
        if self._dead.done():
            raise EngineDeadError(self._dead.result())
        try:
            self._client.check_health()
        except EngineDeadError as error:
            raise EngineRestartingError(str(error)) from None

    async def wait_dead(self) -> str:
        """Return when the engine has been given up. -> why."""
        return await asyncio.shield(self._dead)

    async def close(self) -> None:
        """Stop the engine, whatever it is doing."""
        self._is_closed = True
        self._supervision.cancel()
        await asyncio.gather(self._supervision, self._client.close(), return_exceptions=True)

    async def _supervise(self) -> None:
        num_fruitless = 0
        """Engines in a row that have not finished a request."""
        while True:
            reason = await self._wait_until_it_fails()
            self._is_restarting = True
            num_fruitless = 0 if self._client.num_finished else num_fruitless + 1
            logger.error("the engine has failed: %s", reason)
            await self._client.close()
            while self._may_restart():
                await asyncio.sleep(min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2**num_fruitless))
                try:
                    self._client = await self._start_again()
                    break
                except (EngineStartError, OSError) as error:
                    num_fruitless += 1
                    reason = str(error)
                    logger.error("the engine could not be started again: %s", reason)
            else:
                self._dead.set_result(reason)
                return
            self._is_restarting = False
            logger.warning("the engine serves again, after restart %d", self.num_restarts)

    async def _wait_until_it_fails(self) -> str:
        """-> why."""
        death = asyncio.create_task(self._client.wait_dead())
        num_messages, silent_s, still_s = 0, 0.0, 0.0
        try:
            while not (await asyncio.wait({death}, timeout=WATCH_SECONDS))[0]:
                is_silent = self._client.num_in_flight and self._client.num_messages == num_messages
                num_messages = self._client.num_messages
                silent_s += WATCH_SECONDS  # by no clock, which runs while we are stopped
                silent_s *= bool(is_silent)
                still_s = still_s + WATCH_SECONDS if is_silent and not self._client.has_stirred() else 0.0
                limit_s = self._policy.hang_timeout_s
                if 0 < limit_s <= silent_s or (limit_s and still_s >= STILL_LIMIT_SECONDS):
                    self._client.kill(f"it has hung for {silent_s:g} s")
            return death.result()
        finally:
            death.cancel()

    def _may_restart(self) -> bool:
        now = time.monotonic()
        while self._restarts and self._restarts[0] < now - WINDOW_SECONDS:
            self._restarts.popleft()
        if len(self._restarts) >= self._policy.max_restarts:
            return False
        self._restarts.append(now)
        self.num_restarts += 1
        self.on_restart()
        return True

    async def _start_again(self) -> ProcessEngineClient:
        """Raises EngineStartError, also for an engine for which the server was not built."""
        before = self._client.info
        limit_s = max(SHORTEST_START_LIMIT_SECONDS, START_LIMIT_FACTOR * before.load_seconds)
        try:
            async with asyncio.timeout(limit_s):
                client = await self._start()
        except TimeoutError:
            raise EngineStartError(f"it was not ready after {limit_s:g} s") from None
        now = client.info
        if (now.max_model_len, now.vocab_size) != (before.max_model_len, before.vocab_size):
            await client.close()
            raise EngineStartError("the checkpoint or the device has changed: restart the server")
        return client
