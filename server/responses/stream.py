"""A response as server-sent events: named, numbered, and without [DONE] at the end."""

from __future__ import annotations

from collections.abc import Iterable

from server.errors import ApiError
from server.generation.channel import Channel
from server.generation.generation import Delta
from server.generation.replies import Body
from server.generation.streaming import EventStream, encode_event
from server.responses.builder import ResponseBuilder


class ResponseStream(EventStream[Delta]):
    """The streaming answer of POST /v1/responses; owns its channel."""

    def __init__(self, deltas: Channel[Delta], builder: ResponseBuilder, *, keep_alive_s: float | None) -> None:
        self._builder = builder
        super().__init__(deltas, keep_alive_s=keep_alive_s)

    def _opening(self) -> bytes:
        return _encode(self._builder.begin())

    def _piece(self, item: Delta) -> bytes:
        return _encode(self._builder.take(item))

    def _ending(self) -> bytes:
        return b""

    def _failure(self, error: ApiError) -> bytes:
        return _encode(self._builder.fail(error.message))


def _encode(events: Iterable[Body]) -> bytes:
    return b"".join(b"event: " + event["type"].encode() + b"\n" + encode_event(event) for event in events)
