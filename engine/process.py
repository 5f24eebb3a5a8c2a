"""The engine's process: build the core, say that it is ready, serve until told to stop or orphaned.

Started with `spawn` by `ProcessEngineClient`. A reader thread takes messages off the pipe so that the loop never
waits for one while it has work; when the pipe closes, the parent is gone and the process ends itself.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

from engine import channel
from engine.core import EngineCore
from engine.device import resolve_device
from engine.errors import EngineStartError, RankError
from engine.log_lines import log_all
from engine.loop import Inbox, run_loop
from engine.messages import EngineArgs, EngineFailed, FromEngine, LoadProgress, Shutdown

CPU_NICENESS = 5
"""On a CPU the engine would take all there is: the HTTP process, which needs little, goes first."""

GIVE_UP_SECONDS = 2.0
"""How long a message that is just being written may keep the last one from being sent."""

REPORT_SECONDS = 0.05
"""Between two messages about the progress of loading."""

logger = logging.getLogger(__name__)


def main(args: EngineArgs, connection: Connection) -> None:
    """Entry point of the child process."""
    configure("engine", as_json=args.log_json)
    outbox = _Outbox(connection)
    try:
        if resolve_device(args.device).type == "cpu":
            _lower_priority()
        core = EngineCore.build(args, progress=outbox.report, on_failure=outbox.give_up)
    except EngineStartError as error:
        outbox.give_up(str(error))
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the parent has gone meanwhile
    settle_memory()
    inbox: Inbox = Inbox()
    try:
        outbox.send(core.info)
        threading.Thread(target=_read, args=(connection, inbox), daemon=True, name="reader").start()
        run_loop(core, inbox, outbox.send)
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the parent is gone; other ranks end when this one does
    except RankError as error:
        outbox.give_up(str(error))
    except Exception as error:
        logger.exception("the engine cannot go on")
        outbox.give_up(f"{type(error).__name__} in the engine; its log has the details")
    core.close()
    os._exit(0)  # nothing is left to be written, and taking torch apart, module by module, brings only warnings


class _Outbox:
    """What is sent to the parent: by the loop, and at the end by whoever finds that the engine cannot go on."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._reported = 0.0
        """When progress was last told."""

    def send(self, message: FromEngine) -> None:
        """Raises OSError when the parent is gone."""
        with self._lock:
            channel.send(self._connection, message)

    def report(self, done: int, total: int) -> None:
        """How far loading is, now and then, and its end. Raises OSError when the parent is gone."""
        now = time.monotonic()
        if done == total or now - self._reported >= REPORT_SECONDS:
            self._reported = now
            self.send(LoadProgress(done, total))

    def give_up(self, reason: str) -> NoReturn:
        """From any thread: say why, and end the process with all that it has started."""
        if self._lock.acquire(timeout=GIVE_UP_SECONDS):
            with suppress(OSError):
                channel.send(self._connection, EngineFailed(reason))
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(1)  # other threads may wait for what never comes


def configure(name: str, *, as_json: bool) -> None:
    """Logging and signals of an engine's process."""
    log_all(name, as_json=as_json)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def settle_memory() -> None:
    """Once all is loaded that lives as long as the process."""
    gc.collect()
    gc.freeze()  # torch and the model: a full collection would walk them in the middle of a step
    _return_free_memory()


def _lower_priority() -> None:
    """Of this thread, so of all that it will start, and on Linux of those that libraries have started already."""
    priority = os.nice(CPU_NICENESS)
    threads = Path("/proc/self/task")
    for thread in threads.iterdir() if threads.exists() else ():
        os.setpriority(os.PRIO_PROCESS, int(thread.name), priority)


def _return_free_memory() -> None:
    """What loading has left: glibc is told to keep what is freed (engine/environment.py), and weights are large."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _read(connection: Connection, inbox: Inbox) -> None:
    try:
        while True:
            inbox.put(channel.receive(connection))
    except (EOFError, OSError):
        inbox.put(Shutdown())
