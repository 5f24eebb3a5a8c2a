"""Rank 0's hold on the other ranks of a tensor-parallel engine: processes that follow it, each by a pipe.

What the ranks compute together is told them in one message, just before rank 0 computes it too. They answer only
while they start. A thread for each pipe waits for its end: a rank that dies ends the engine at once, be rank 0 in
the middle of a step or idle. One that hangs is found by those who wait for it (`EngineArgs.rank_timeout_s`). With
one rank there are no workers and nothing to tell.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import torch

from engine import channel
from engine.errors import EngineStartError, RankError
from engine.input_batch import ForwardStep, LogitRows
from engine.messages import EngineArgs, EngineFailed, Shutdown
from engine.spawn import JOIN_SECONDS, end, spawn
from model.parallel import Shard, join_group, leave_group

DIAGNOSIS_SECONDS = 2.0
"""How long a step that failed waits for the news that a worker has died, which tells more than its own error."""

OnFailure = Callable[[str], None]
"""Called from a thread when a worker has failed: rank 0 may be waiting for it where nothing else interrupts it."""

logger = logging.getLogger(__name__)


class Workers:
    """See the module's docstring."""

    def __init__(self, args: EngineArgs, on_failure: OnFailure | None = None) -> None:
        """Start the processes, which begin to load. Their size has been checked."""
        self.shard = Shard(0, args.tensor_parallel_size)
        self._timeout_s = args.rank_timeout_s
        self._on_failure = on_failure or logger.error
        self._news: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        """None for each step of a worker's start, a sentence for what went wrong."""
        self._on_cuda = False
        self._are_joined = False
        self._are_closing = False
        self._members: list[tuple[SpawnProcess, Connection]] = []
        if self.shard.size == 1:
            return
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        for rank in range(1, self.shard.size):
            member = spawn("engine.worker", f"tympan-rank-{rank}", args.device, args, rank, port)
            self._members.append(member)
            threading.Thread(target=self._watch, args=(rank, *member), daemon=True, name=f"rank {rank}").start()

    def join(self, device: torch.device) -> None:
        """Wait until all have loaded, and connect to them. Raises EngineStartError."""
        if self._members:
            self._wait()
            self._on_cuda, self._are_joined = device.type == "cuda", True
            try:
                join_group(self.shard, self._listener, device, self._timeout_s)
            except RuntimeError as error:
                raise EngineStartError(f"the ranks cannot connect: {self._diagnosis(error)}") from error

    def wait_ready(self) -> None:
        """Wait until all serve. Raises EngineStartError."""
        self._wait()

    @contextmanager
    def in_step(self, message: ForwardStep | LogitRows) -> Iterator[None]:
        """Tell the workers what to compute; the same is computed inside. Raises RankError for what goes wrong there.

        (A rank that has not come to the end of it waits for the others, or they for it.)
        """
        if not self._members:
            yield
            return
        try:
            self._tell(message)
            yield
        except Exception as error:
            raise RankError(self._diagnosis(error)) from error

    def close(self) -> None:
        """End them in good order."""
        if self._members:
            self._are_closing = True
            with suppress(OSError):
                self._tell(Shutdown())
            leave_group()
            self._end()

    def kill(self) -> None:
        """End them when the start has failed."""
        if self._members:
            self._are_closing = True
            self._listener.close()
            for process, _ in self._members:
                process.kill()
            self._end()
            if not self._on_cuda:  # there it would wait for them; the process is about to end
                leave_group()

    def _tell(self, message: ForwardStep | LogitRows | Shutdown) -> None:
        for _, connection in self._members:
            channel.send(connection, message)

    def _wait(self) -> None:
        for _ in self._members:
            if (reason := self._news.get()) is not None:
                raise EngineStartError(reason)

    def _end(self) -> None:
        for process, _ in self._members:
            end(process)
        self._members.clear()

    def _watch(self, rank: int, process: SpawnProcess, connection: Connection) -> None:
        """A thread: until the worker fails or is gone."""
        try:
            while not isinstance(message := channel.receive(connection), EngineFailed):
                self._news.put(None)
            reason = f"rank {rank}: {message.reason}"
        except (EOFError, OSError):
            process.join(JOIN_SECONDS)
            reason = f"rank {rank} has ended (exit code {process.exitcode})"
        if not self._are_closing:
            self._news.put(reason)
            if self._are_joined:
                self._on_failure(reason)

    def _diagnosis(self, error: Exception) -> str:
        """What the workers say of a failure, else the failure itself."""
        with suppress(queue.Empty):
            while True:
                if (reason := self._news.get(timeout=DIAGNOSIS_SECONDS)) is not None:
                    return reason
        return f"the ranks are out of step: {type(error).__name__}: {' '.join(str(error).split())}"
