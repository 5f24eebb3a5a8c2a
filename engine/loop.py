"""The busy loop around the core: take messages, step, send. The same for a process and for a thread."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable

from engine.answer import failed
from engine.core import EngineCore
from engine.errors import RequestError
from engine.messages import AbortRequest, EngineOutput, EngineRequest, FromEngine, Shutdown, StepOutputs, ToEngine

logger = logging.getLogger(__name__)

Inbox = queue.SimpleQueue[ToEngine]
Emit = Callable[[FromEngine], None]


def run_loop(core: EngineCore, inbox: Inbox, emit: Emit) -> None:
    """Serve until a Shutdown arrives. An exception of a step ends the loop: the caller reports it.

    Whatever happened is told at once, be it only an abort: the other side shows the counters.
    """
    while True:
        refused: list[EngineOutput] = []
        for message in _take(inbox, wait=not core.has_work):
            if isinstance(message, Shutdown):
                return
            if isinstance(message, AbortRequest):
                core.abort(message.request_id, message.index)
            else:
                refused += _add(core, message)
        outputs = refused + (core.step() if core.has_work else [])
        emit(StepOutputs(tuple(outputs), core.stats))
        if not core.has_work:
            core.scheduler.check_integrity()


def _add(core: EngineCore, request: EngineRequest) -> list[EngineOutput]:
    try:
        core.add_request(request)
    except RequestError as error:
        return [failed((request.request_id, 0), str(error))]
    return []


def _take(inbox: Inbox, *, wait: bool) -> list[ToEngine]:
    """All messages that are there; when there is nothing else to do, at least one."""
    messages = [inbox.get()] if wait else []
    while not inbox.empty():
        messages.append(inbox.get())
    return messages
