"""Processes of the engine: started by `spawn`, tied to their parent by a private pipe. Torch-free.

A child is told to end by a message, and ends by itself when the pipe does, whatever became of its parent. It is no
daemon in the sense of multiprocessing, which would keep it from having children of its own.
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import ModuleType

from engine.environment import engine_environment

JOIN_SECONDS = 5.0
"""How long a process told to stop may take before it is killed."""


def spawn(module: str, name: str, device: str, *arguments: object) -> tuple[SpawnProcess, Connection]:
    """Run `main(*arguments, connection)` of a module in a new process. -> the process, our end of the pipe."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(module, *arguments, theirs), name=name)
    with _nameless_main(), engine_environment(device):
        process.start()
    theirs.close()
    atexit.register(process.kill)  # else multiprocessing waits at exit for a process that ignores SIGTERM
    return process, ours


def end(process: SpawnProcess, wait_s: float = JOIN_SECONDS) -> None:
    """Wait for a process that has been told to stop, then kill it."""
    process.join(wait_s)
    if process.is_alive():
        process.kill()
        process.join()
    atexit.unregister(process.kill)


@contextmanager
def _nameless_main() -> Iterator[None]:
    """A child that is spawned meanwhile leaves the program's main module alone.

    Else it would run it once more, and a script without a `__main__` guard would start engines without end.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _child(module: str, *arguments: object) -> None:
    """Runs in the new process, where importing torch is right."""
    importlib.import_module(module).main(*arguments)
