"""One connection of a client: how long it may take over a request, how large a header may be, what it is told.

uvicorn's, with what it leaves open closed: the header must be whole in time, the body must come at some speed, what
follows an early answer (401, 413) is discarded only so long, and an answer must be read. Slow clients hold nothing
for long. What is no HTTP gets OpenAI's envelope, and 431 where it is too large. There are no websockets.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import uuid
from enum import Enum, auto
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from server.errors import ApiError
from server.http.middleware import MAX_HEADER_BYTES

KEEP_ALIVE_SECONDS = 75
"""Of idle connections: longer than proxies and clients keep theirs, who would else run into closed ones."""
HEADER_SECONDS = 20.0
"""From a connection's beginning, or a header's, to the header's end."""
BODY_SECONDS = 30.0
"""That a body may be behind what comes at `BODY_BYTES_PER_SECOND`."""
BODY_BYTES_PER_SECOND = 1000
DISCARD_SECONDS = 5.0
"""For what is left of a body after the answer."""
UNREAD_SECONDS = 60.0
"""That a client may leave unread what is ready of its answer: 64 KiB here, and what the kernel holds."""

_MESSAGES = {
    400: ("Invalid HTTP request received.", None),
    408: ("The request did not arrive in time.", "request_timeout"),
    431: ("The request header is too large.", "header_too_large"),
    501: ("This transfer encoding is not supported.", None),
}


def server_config(app: Any, **options: Any) -> uvicorn.Config:
    """How the application is served."""
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        **options,
    )


class _Phase(Enum):
    """What a connection waits for from its client, at most for a while."""

    HEADER = auto()
    BODY = auto()
    REST = auto()
    """Of a body that was answered before it had come."""


_SECONDS = {_Phase.HEADER: HEADER_SECONDS, _Phase.BODY: BODY_SECONDS, _Phase.REST: DISCARD_SECONDS}


class Connection(H11Protocol):
    """See the module's docstring."""

    _phase: tuple[_Phase, RequestResponseCycle | None] | None = None
    """With the last request that began; None: nothing is awaited, or nothing of the next request has come."""
    _alarm: asyncio.TimerHandle | None = None
    _deadline = 0.0
    _is_refused = False
    """What still comes is discarded."""
    _patience: asyncio.TimerHandle | None = None
    """With a client that does not read."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _bound_silence(transport)
        self._enter((_Phase.HEADER, None))

    def connection_lost(self, exc: Exception | None) -> None:
        self._enter(None)
        self._silence()
        self._read_again()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read as fast as the answer comes."""
        super().pause_writing()
        self._patience = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read most of what was there."""
        super().resume_writing()
        self._read_again()

    def _read_again(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def data_received(self, data: bytes) -> None:
        if not self._is_refused:
            super().data_received(data)
            self._follow(len(data))

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._follow()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        """Called where the parser has failed, with its error being handled."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self._refuse(status if status in _MESSAGES else 400)

    def _awaited(self) -> tuple[_Phase, RequestResponseCycle | None] | None:
        if self.transport.is_closing():
            return None
        if self.conn.their_state is h11.IDLE and (self.cycle is None or self.conn.trailing_data[0]):
            return _Phase.HEADER, self.cycle
        if self.conn.their_state is h11.SEND_BODY:
            return _Phase.REST if self.cycle.response_complete else _Phase.BODY, self.cycle
        return None

    def _follow(self, num_bytes: int = 0) -> None:
        """Set the alarm for what is awaited now; bytes of a body that goes on put it off."""
        if self._is_refused:
            return
        phase = self._awaited()
        if phase is not None and phase == self._phase and phase[0] is _Phase.BODY:
            self._deadline += num_bytes / BODY_BYTES_PER_SECOND
            self._deadline = min(self._deadline, self.loop.time() + _SECONDS[_Phase.BODY])
        self._enter(phase)

    def _enter(self, phase: tuple[_Phase, RequestResponseCycle | None] | None) -> None:
        if phase == self._phase:
            return
        self._phase = phase
        self._silence()
        if phase is not None:
            self._deadline = self.loop.time() + _SECONDS[phase[0]]
            self._alarm = self.loop.call_at(self._deadline, self._ring)

    def _silence(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _ring(self) -> None:
        if self.flow.read_paused:  # it is the server that does not read
            self._deadline = self.loop.time() + BODY_SECONDS
        if self.loop.time() < self._deadline:
            self._alarm = self.loop.call_at(self._deadline, self._ring)
            return
        assert self._phase is not None, "no alarm where nothing is awaited"
        kind, _ = self._phase
        has_begun = self.conn.trailing_data[0] if kind is _Phase.HEADER else kind is _Phase.BODY
        if has_begun:
            self._refuse(408)
        else:
            self.transport.close()

    def _refuse(self, status: int) -> None:
        """Answer, unless an answer has begun, and close: not at once, a reset would overtake the answer."""
        if self.cycle is not None:
            self.cycle.disconnected = True  # whoever works on the request is told that it has gone
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        message, code = _MESSAGES[status]
        body = ApiError(status, message, code=code).response().body
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("x-request-id", uuid.uuid4().hex),
            ("connection", "close"),
        ]
        reason = HTTPStatus(status).phrase.encode()
        for event in (
            h11.Response(status_code=status, headers=headers, reason=reason),
            h11.Data(data=bytes(body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._is_refused = True
        self._enter(None)
        self._alarm = self.loop.call_later(DISCARD_SECONDS, self.transport.close)


def _bound_silence(transport: asyncio.Transport) -> None:
    """The kernel gives up a client that confirms nothing of what was sent for so long, closed connections too."""
    sock = transport.get_extra_info("socket")
    if sock is not None and hasattr(socket, "TCP_USER_TIMEOUT") and sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(2000 * UNREAD_SECONDS))
