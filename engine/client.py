"""How the HTTP side talks to an engine: `EngineClient`, and its two real implementations.

    ProcessEngineClient   the engine in a process of its own, over a private pipe: production
    InlineEngineClient    the same loop in a thread of this process: tests and offline use

`generate` is an async generator: it submits on the first pull and aborts when it is closed early. Closing it is the
only way to cancel a request, whatever the cause (client gone, stop string, timeout, shutdown); `end_choice` ends one
of several choices. This module is torch-free: what needs torch is imported by the thread or process that runs it.
"""

from __future__ import annotations

import asyncio
import importlib
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Protocol, Self

from engine import channel
from engine.errors import (
    EngineClosedError,
    EngineDeadError,
    EngineError,
    EngineStartError,
    RequestError,
    TimeLimitError,
)
from engine.messages import (
    AbortRequest,
    EngineArgs,
    EngineFailed,
    EngineInfo,
    EngineOutput,
    EngineRequest,
    EngineStats,
    FinishReason,
    FromEngine,
    LoadProgress,
    Shutdown,
    StepOutputs,
    ToEngine,
)
from engine.spawn import JOIN_SECONDS, end, spawn
from engine.vital_signs import VitalSigns

REAP_SECONDS = 1.0
"""How long its requests wait for a dead engine's exit code: nobody is the wiser for it."""

OnProgress = Callable[[int, int], None]
"""Called with (tensors loaded, tensors in all) while an engine starts."""


class EngineClient(Protocol):
    """What the server needs of an engine."""

    @property
    def info(self) -> EngineInfo:
        """Facts fixed at start."""
        ...

    @property
    def stats(self) -> EngineStats:
        """The latest snapshot."""
        ...

    def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """Run a request until all its choices have ended.

        Raises RequestError when it fails in the engine, TimeLimitError when its time is up, and EngineDeadError when
        the engine fails.
        """
        ...

    def end_choice(self, request_id: str, index: int) -> None:
        """Stop one choice of a request in flight: no more outputs of it come. The others go on."""
        ...

    def check_health(self) -> None:
        """Raises EngineDeadError unless the engine is serving."""
        ...

    async def wait_dead(self) -> str:
        """Return when the engine has failed. -> why."""
        ...

    async def close(self) -> None:
        """Stop the engine. Requests in flight end with EngineDeadError."""
        ...


@dataclass(slots=True)
class _InFlight:
    """A request that `generate` waits for."""

    unfinished: set[int]
    """Choices that have not ended."""
    outputs: asyncio.Queue[EngineOutput | EngineError] = field(default_factory=asyncio.Queue)


class _QueueClient:
    """What both implementations share: one queue for each request in flight, all touched on the event loop only."""

    def __init__(self, info: EngineInfo, send: Callable[[ToEngine], None]) -> None:
        self._info = info
        self._stats = EngineStats()
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._in_flight: dict[str, _InFlight] = {}
        self._dead: asyncio.Future[str] = self._loop.create_future()
        self._death = EngineDeadError
        self.num_finished = 0
        """Requests whose choices have all ended, none of them by a failure."""
        self.num_messages = 0
        """That have come from the engine: while it has work, at least one comes for each step."""

    @property
    def info(self) -> EngineInfo:
        """Facts fixed at start."""
        return self._info

    @property
    def stats(self) -> EngineStats:
        """The latest snapshot."""
        return self._stats

    @property
    def num_in_flight(self) -> int:
        """Requests that wait for an output."""
        return len(self._in_flight)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """See EngineClient."""
        self.check_health()
        if request.request_id in self._in_flight:
            raise RequestError("the request id is in use")
        flight = self._in_flight[request.request_id] = _InFlight(set(range(request.n)))
        self._send(request)
        alarm = self._set_alarm(request.time_limit_s, flight)
        try:
            while flight.unfinished:
                output = await flight.outputs.get()
                if isinstance(output, EngineError):
                    raise output
                if output.index not in flight.unfinished:
                    continue
                if output.finish_reason is FinishReason.ERROR:
                    flight.unfinished.remove(output.index)
                    raise RequestError(output.error or "the request failed")
                if output.finish_reason is not None:
                    self._end_choice(flight, output.index)
                yield output
        finally:
            if alarm:
                alarm.cancel()
            del self._in_flight[request.request_id]
            if flight.unfinished and not self._dead.done():
                self._send(AbortRequest(request.request_id))

    def _set_alarm(self, time_limit_s: float | None, flight: _InFlight) -> asyncio.TimerHandle | None:
        if time_limit_s is None:
            return None
        late = TimeLimitError(f"The request took longer than {time_limit_s:g} s.")
        return self._loop.call_later(time_limit_s, flight.outputs.put_nowait, late)

    def end_choice(self, request_id: str, index: int) -> None:
        """See EngineClient."""
        flight = self._in_flight.get(request_id)
        if flight is not None and index in flight.unfinished:
            self._end_choice(flight, index)
            self._send(AbortRequest(request_id, index))

    def _end_choice(self, flight: _InFlight, index: int) -> None:
        flight.unfinished.remove(index)
        self.num_finished += not flight.unfinished

    def check_health(self) -> None:
        """See EngineClient."""
        if self._dead.done():
            raise self._death(self._dead.result())

    async def wait_dead(self) -> str:
        """See EngineClient."""
        return await asyncio.shield(self._dead)

    def _receive(self, message: FromEngine) -> None:
        """On the event loop: hand outputs to whoever waits for them."""
        self.num_messages += 1
        if isinstance(message, StepOutputs):
            self._stats = message.stats
            for output in message.outputs:
                if flight := self._in_flight.get(output.request_id):
                    flight.outputs.put_nowait(output)
        elif isinstance(message, EngineFailed):
            self._fail(message.reason)

    def _fail(self, reason: str, death: type[EngineDeadError] = EngineDeadError) -> None:
        """On the event loop: the engine serves no more."""
        if not self._dead.done():
            self._death = death
            self._dead.set_result(reason)
            for flight in self._in_flight.values():
                flight.outputs.put_nowait(death(reason))

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        """From a thread: run on the event loop, unless that is already closed."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


class ProcessEngineClient(_QueueClient):
    """The engine in a child process. Threads do the pipe's blocking reads and writes."""

    def __init__(self, process: SpawnProcess, connection: Connection, info: EngineInfo) -> None:
        self._outbox: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()
        super().__init__(info, self._outbox.put)
        assert process.pid is not None, "it has been started"
        self.process = process
        self._signs = VitalSigns(process.pid)
        self._connection = connection
        self._threads = [
            threading.Thread(target=target, daemon=True, name=f"engine{target.__name__}")
            for target in (self._read, self._write)
        ]
        for thread in self._threads:
            thread.start()

    @classmethod
    async def start(cls, args: EngineArgs, on_progress: OnProgress | None = None) -> Self:
        """Spawn the process and wait until it is ready. Raises EngineStartError."""
        process, ours = spawn("engine.process", "tympan-engine", args.device, args)
        try:
            while isinstance(first := await asyncio.to_thread(channel.receive, ours), LoadProgress):
                if on_progress is not None:
                    on_progress(first.done, first.total)
        except (EOFError, OSError):
            await asyncio.to_thread(end, process)
            raise EngineStartError(
                f"the engine process ended while starting (exit code {process.exitcode})"
            ) from None
        except asyncio.CancelledError:
            process.kill()
            end(process, REAP_SECONDS)
            raise
        if isinstance(first, EngineFailed):
            await asyncio.to_thread(end, process)
            raise EngineStartError(first.reason)
        return cls(process, ours, first)

    def has_stirred(self) -> bool:
        """Whether its process has done anything since the last call."""
        return self._signs.have_stirred()

    def kill(self, reason: str) -> None:
        """End the process at once, and with `reason` all requests in flight."""
        self._fail(reason)
        self.process.kill()

    async def close(self) -> None:
        """See EngineClient."""
        self._fail("the server is shutting down", EngineClosedError)
        self._outbox.put(Shutdown())
        self._outbox.put(None)
        await asyncio.to_thread(end, self.process)
        for thread in self._threads:
            await asyncio.to_thread(thread.join, JOIN_SECONDS)
        self._connection.close()

    def _read(self) -> None:
        try:
            while True:
                self._call(self._receive, channel.receive(self._connection))
        except (EOFError, OSError):
            self.process.join(REAP_SECONDS)
            self._call(self._fail, f"the engine process ended (exit code {self.process.exitcode})")

    def _write(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                channel.send(self._connection, message)
        except OSError:
            return  # the reader reports it


class InlineEngineClient(_QueueClient):
    """The engine in a thread."""

    def __init__(self, inbox: queue.SimpleQueue[ToEngine], info: EngineInfo) -> None:
        super().__init__(info, inbox.put)
        self._thread: threading.Thread | None = None

    @classmethod
    async def start(cls, args: EngineArgs) -> Self:
        """Build the engine in a thread and wait until it is ready. Raises EngineStartError."""
        core_module, loop_module = importlib.import_module("engine.core"), importlib.import_module("engine.loop")
        core = await asyncio.to_thread(core_module.EngineCore.build, args)
        inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        client = cls(inbox, core.info)

        def serve() -> None:
            try:
                loop_module.run_loop(core, inbox, lambda message: client._call(client._receive, message))
            except Exception as error:
                client._call(client._fail, f"{type(error).__name__}: {error}")
            finally:
                core.close()

        client._thread = threading.Thread(target=serve, daemon=True, name="engine")
        client._thread.start()
        return client

    async def close(self) -> None:
        """See EngineClient."""
        self._fail("the engine was closed", EngineClosedError)
        self._send(Shutdown())
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, JOIN_SECONDS)
