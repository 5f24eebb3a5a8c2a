"""The answers of transcription, whole and in events, as OpenAI writes them: shapes only."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

from starlette.responses import JSONResponse, PlainTextResponse, Response

from server.transcription.languages import LANGUAGES
from server.transcription.transcriber import Segment, Transcription, TranscriptUsage

Body = dict[str, Any]

SEEK_PER_SECOND = 100
"""Whisper counts `seek` in mel frames."""


def whole(transcription: Transcription, text: str, segments: Sequence[Segment]) -> Response:
    """The answer in the format that the form asks for."""
    match transcription.form.response_format:
        case "text":
            return PlainTextResponse(text + "\n")
        case "srt":
            return PlainTextResponse(srt(segments))
        case "vtt":
            return PlainTextResponse(vtt(segments))
        case "verbose_json":
            return JSONResponse(_verbose(transcription, text, segments))
        case _ if transcription.form.task == "translate":
            return JSONResponse({"text": text})
        case _:
            return JSONResponse({"text": text, "usage": _token_usage(transcription.usage)})


def delta_event(piece: str) -> Body:
    """More text."""
    return {"type": "transcript.text.delta", "delta": piece}


def done_event(text: str, usage: TranscriptUsage) -> Body:
    """All of it."""
    return {"type": "transcript.text.done", "text": text, "usage": _token_usage(usage)}


def srt(segments: Sequence[Segment]) -> str:
    """SubRip: numbered cues, a comma before the milliseconds."""
    return "".join(
        f"{number}\n{_time(cue.start_s, ',')} --> {_time(cue.end_s, ',')}\n{_cue_text(cue)}\n\n"
        for number, cue in enumerate(segments, 1)
    )


def vtt(segments: Sequence[Segment]) -> str:
    """WebVTT, whose text is markup."""
    cues = (
        f"{_time(cue.start_s, '.')} --> {_time(cue.end_s, '.')}\n"
        f"{_cue_text(cue).replace('&', '&amp;').replace('<', '&lt;')}\n\n"
        for cue in segments
    )
    return "WEBVTT\n\n" + "".join(cues)


def _time(seconds: float, point: str) -> str:
    milliseconds = round(1000 * seconds)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"


def _cue_text(cue: Segment) -> str:
    """In one line: an empty line would end the cue, an arrow begin another."""
    return " ".join(cue.text.split()).replace("-->", "->")


def _verbose(transcription: Transcription, text: str, segments: Sequence[Segment]) -> Body:
    form, usage = transcription.form, transcription.usage
    code = "en" if form.task == "translate" else form.language or transcription.text.language
    return {
        "task": form.task,
        "language": LANGUAGES[code].lower() if code in LANGUAGES else None,
        "duration": round(usage.seconds, 3),
        "text": text,
        "segments": [_segment(index, segment, form.temperature) for index, segment in enumerate(segments)],
        "usage": {"type": "duration", "seconds": math.ceil(usage.seconds)},
    }


def _segment(index: int, segment: Segment, temperature: float) -> Body:
    logprobs = [token.logprob for token in segment.tokens]
    raw = segment.text.encode()
    return {
        "id": index,
        "seek": round(segment.start_s * SEEK_PER_SECOND),
        "start": round(segment.start_s, 3),
        "end": round(segment.end_s, 3),
        "text": segment.text,
        "tokens": [token.token_id for token in segment.tokens],
        "temperature": temperature,
        "avg_logprob": sum(logprobs) / len(logprobs) if logprobs else 0.0,
        "compression_ratio": len(raw) / len(zlib.compress(raw)),
        "no_speech_prob": 0.0,
    }


def _token_usage(usage: TranscriptUsage) -> Body:
    return {
        "type": "tokens",
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "input_token_details": {
            "audio_tokens": usage.audio_tokens,
            "text_tokens": usage.prompt_tokens - usage.audio_tokens,
        },
    }
