"""An answer as server-sent events: the bytes, their order, and what happens when it fails or falls silent.

    [role chunks] chunk... [usage chunk] [DONE]

The last text of each choice rides on the chunk with its finish reason. While nothing comes, comment lines keep
proxies from closing the connection. A failure after the headers is an error event, then [DONE]. Closing the
response, for whatever reason, aborts the request in the engine.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Generic, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from server.errors import ApiError, to_api_error
from server.generation.channel import Channel
from server.generation.generation import Delta, Usage
from server.generation.replies import Body, Reply
from server.observe.logs import log_failure
from server.observe.request_record import RequestRecord

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"

_to_json = json.JSONEncoder(separators=(",", ":")).encode  # made once: this runs for every token

T = TypeVar("T")

logger = logging.getLogger(__name__)


def encode_event(data: Any) -> bytes:
    """One event. ASCII only: some clients take U+2028 or U+0085 for the end of a line."""
    return b"data: " + _to_json(data).encode() + b"\n\n"


class EventStream(StreamingResponse, ABC, Generic[T]):
    """The streaming response of one answer; owns its channel. Its subclasses know what the events say."""

    def __init__(self, items: Channel[T], *, keep_alive_s: float | None) -> None:
        self._items = items
        self._keep_alive_s = keep_alive_s
        self._record: RequestRecord | None = None
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._events(), headers=headers, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._record = scope["state"]["record"]
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._items.aclose()

    async def _events(self) -> AsyncGenerator[bytes, None]:
        try:
            if opening := self._opening():
                yield opening
            async with aclosing(self._pieces()) as pieces:
                async for piece in pieces:
                    yield piece
            ending = self._ending()
        except Exception as error:
            log_failure(logger, "a stream failed after it had begun", error)
            told = to_api_error(error)
            if self._record is not None:
                self._record.broken(told.code or str(told.status))
            ending = self._failure(told)
        if ending:
            yield ending

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        while True:
            try:
                item = await self._items.get(self._keep_alive_s)
            except TimeoutError:
                yield KEEP_ALIVE
                continue
            except StopAsyncIteration:
                return
            if piece := self._piece(item):
                yield piece

    @abstractmethod
    def _opening(self) -> bytes: ...

    @abstractmethod
    def _piece(self, item: T) -> bytes: ...

    @abstractmethod
    def _ending(self) -> bytes: ...

    @abstractmethod
    def _failure(self, error: ApiError) -> bytes: ...


class ReplyStream(EventStream[Delta]):
    """The stream of POST /v1/chat/completions and /v1/completions."""

    def __init__(
        self,
        deltas: Channel[Delta],
        reply: Reply,
        usage: Usage,
        *,
        include_usage: bool,
        keep_alive_s: float | None,
    ) -> None:
        self._reply = reply
        self._usage = usage
        self._include_usage = include_usage
        super().__init__(deltas, keep_alive_s=keep_alive_s)

    def _opening(self) -> bytes:
        return b"".join(map(self._chunk, self._reply.openings()))

    def _piece(self, item: Delta) -> bytes:
        return self._chunk(self._reply.chunk(item))

    def _ending(self) -> bytes:
        return (encode_event(self._reply.usage_chunk(self._usage)) if self._include_usage else b"") + DONE

    def _failure(self, error: ApiError) -> bytes:
        return encode_event(error.envelope()) + DONE

    def _chunk(self, body: Body) -> bytes:
        return encode_event(body | {"usage": None} if self._include_usage else body)
