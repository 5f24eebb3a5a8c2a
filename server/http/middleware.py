"""Round every request: its id, its API key, its record, its header's size, its place in flight, the last resort.

Pure ASGI: a wrapper that buffers responses, or hides disconnects, would break streaming. Every answer carries
x-request-id, errors included. What metrics, logs and traces make of a request's record is its observers' business.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.access.admission import Traffic
from server.access.auth import ApiKeys
from server.errors import ApiError, to_api_error
from server.observe.logs import log_failure
from server.observe.request_record import NO_METER, Meter, RequestObserver, RequestRecord

PROBES = ("/health", "/ready")
"""Open to all. Everything else needs the key, the files of a page aside."""
LINGER_SECONDS = 2.0
LINGER_BYTES = 32 << 20
"""How long, and how much, a refused client may go on sending before the connection closes, as it asked."""
CLIENT_GONE = 499
"""nginx's status for a client that left before an answer began; only ever recorded."""

KEY_ID_DIGITS = 8
"""Of a key's hash: enough to tell keys apart, useless to guess one."""

MAX_HEADER_BYTES = 32 << 10
"""Of a request, names, values and URL together."""
MAX_HEADERS = 100

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

logger = logging.getLogger(__name__)


class RequestScope:
    """The outermost layer of the application."""

    def __init__(
        self,
        app: ASGIApp,
        keys: ApiKeys,
        traffic: Traffic,
        route_of: Callable[[Scope], str],
        is_open: Callable[[str, str], bool],
        observers: Sequence[RequestObserver] = (),
        meter: Meter = NO_METER,
    ) -> None:
        """is_open: whether a method and path need no key, probes aside; observers: told of every request, at its
        beginning and its end; meter: what its record counts with."""
        self._app = app
        self._keys = keys
        self._traffic = traffic
        self._route_of = route_of
        self._is_open = is_open
        self._observers = observers
        self._meter = meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        exchange = _Exchange(receive, send, headers, self._record(scope))
        record = exchange.record
        self._traffic.num_in_flight += 1
        for observer in self._observers:
            observer.begin(record)
        try:
            if scope["path"] not in PROBES:
                if not self._is_open(scope["method"], scope["path"]):
                    caller = self._keys.check(headers.getlist("authorization"))
                    record.key_id = caller[:KEY_ID_DIGITS] or None
                    scope["state"]["caller"] = caller
                check_header_size(scope)
                self._traffic.check_welcome()
            with self._traffic.place(scope["method"]) as held:
                scope["state"]["held"] = held
                await self._app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            record.status = CLIENT_GONE
        except Exception as error:
            await exchange.fail(error, scope)
            # Frames and failure hold each other, and the body with them, until a collection that may be far off.
            traceback.clear_frames(error.__traceback__)
        finally:
            self._traffic.num_in_flight -= 1
            record.ended = time.monotonic()
            for observer in self._observers:
                observer.end(record)

    def _record(self, scope: Scope) -> RequestRecord:
        headers = Headers(scope=scope)
        asked_id = headers.get("x-request-id", "")
        record = scope.setdefault("state", {})["record"] = RequestRecord(
            request_id=asked_id if _REQUEST_ID.fullmatch(asked_id) else uuid.uuid4().hex,
            method=scope["method"],
            route=self._route_of(scope),
            path=scope["path"][:200],
            meter=self._meter,
            traceparent=headers.get("traceparent"),
            tracestate=headers.get("tracestate"),
            status=CLIENT_GONE,
        )
        return record


def check_header_size(scope: Scope) -> None:
    """Raise ApiError (431) above the limits. The parser has one too, but not for what comes in one piece."""
    sizes = [len(name) + len(value) for name, value in scope["headers"]]
    num_bytes = sum(sizes) + len(scope.get("raw_path") or b"") + len(scope["query_string"])
    if len(sizes) > MAX_HEADERS or num_bytes > MAX_HEADER_BYTES:
        message = f"The request header is too large: at most {MAX_HEADERS} fields and {MAX_HEADER_BYTES} bytes."
        raise ApiError(431, message, code="header_too_large", headers={"Connection": "close"})


class _Exchange:
    """One request on its way in and its answer on its way out."""

    def __init__(self, receive: Receive, send: Send, headers: Headers, record: RequestRecord) -> None:
        self._receive = receive
        self._send = send
        self.record = record
        has_body = "content-length" in headers or "transfer-encoding" in headers
        self._is_body_coming = has_body and headers.get("connection", "").lower() == "close"
        """And nobody will read it after the answer (see server/http/connection.py)."""
        self._has_begun = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._is_body_coming = self._is_body_coming and bool(message.get("more_body"))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._has_begun = True
            self.record.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self.record.request_id
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.record.is_complete = True

    async def fail(self, error: Exception, scope: Scope) -> None:
        """Answer with the error, unless an answer has begun: then only the connection can tell."""
        told = to_api_error(error)
        self.record.refusal, self.record.is_broken = told.code or str(told.status), self._has_begun
        if told.status >= 500 and told is not error:
            log_failure(logger, f"request {self.record.request_id} failed", error)
        if self._has_begun:
            raise error
        await told.response()(scope, self.receive, self._send_before_body if self._is_body_coming else self.send)

    async def _send_before_body(self, message: Message) -> None:
        """An answer to a client that is still sending: closing on it would reset the connection, answer and all."""
        if message["type"] != "http.response.body":
            await self.send(message)
            return
        await self.send({**message, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                num_bytes = 0
                while self._is_body_coming and num_bytes < LINGER_BYTES:
                    num_bytes += len((await self.receive()).get("body", b""))
        await self.send({"type": "http.response.body"})
