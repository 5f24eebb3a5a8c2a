"""POST /v1/audio/transcriptions and /v1/audio/translations: from a form to its answer.

The first piece of text is awaited before any header goes out (for at most one keep-alive interval), so that an
early failure keeps its true status. Whatever happens, the work is stopped first and then the upload removed.
"""

from __future__ import annotations

from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import ApiError
from server.generation.channel import Channel
from server.generation.streaming import DONE, EventStream, encode_event
from server.http.multipart import Form
from server.transcription.form import TranscriptionForm, parse_transcription
from server.transcription.transcriber import Segment, Transcriber, Transcription
from server.transcription.transcripts import delta_event, done_event, whole


async def transcribe(transcriber: Transcriber, form: Form, model: type[TranscriptionForm]) -> Response:
    """Answer whole or as a stream; owns `form`. Raises ApiError, RequestError, EngineDeadError."""
    is_handed_on = False
    try:
        fields = parse_transcription(model, form.fields)
        transcriber.serving.model_name(fields.model)
        transcription = transcriber.transcription(fields, form.file.content)
        if not fields.stream:
            return await _collect(transcription)
        keep_alive_s = transcriber.serving.keep_alive_s
        pieces = Channel(transcription.pieces())
        try:
            await pieces.wait_begun(keep_alive_s)
        except StopAsyncIteration:
            pass  # no text at all; the stream will say so
        except BaseException:
            await pieces.aclose()
            raise
        response = TranscriptStream(transcription, pieces, form, keep_alive_s)
        is_handed_on = True
        return response
    finally:
        if not is_handed_on:
            form.close()


async def _collect(transcription: Transcription) -> Response:
    text: list[str] = []
    segments: list[Segment] = []
    async with aclosing(transcription.pieces()) as pieces:
        async for piece in pieces:
            if isinstance(piece, Segment):
                segments.append(piece)
            else:
                text.append(piece)
    return whole(transcription, "".join(text), segments)


class TranscriptStream(EventStream[str | Segment]):
    """transcript.text.delta events, one transcript.text.done, [DONE]. Owns the channel and the upload."""

    def __init__(
        self,
        transcription: Transcription,
        pieces: Channel[str | Segment],
        form: Form,
        keep_alive_s: float | None,
    ) -> None:
        self._transcription = transcription
        self._form = form
        self._text: list[str] = []
        super().__init__(pieces, keep_alive_s=keep_alive_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._form.close()

    def _opening(self) -> bytes:
        return b""

    def _piece(self, item: str | Segment) -> bytes:
        if isinstance(item, Segment):
            return b""
        self._text.append(item)
        return encode_event(delta_event(item))

    def _ending(self) -> bytes:
        return encode_event(done_event("".join(self._text), self._transcription.usage)) + DONE

    def _failure(self, error: ApiError) -> bytes:
        return encode_event(error.envelope()) + DONE
