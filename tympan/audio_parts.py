"""Clips as a Python program has them (files, bytes, arrays) to parts that the API takes.

    {"type": "audio", "audio": path | bytes | (samples, sampling_rate) | URL}

Local files are read here and nowhere else: the caller is the user, which over HTTP nobody can know. URLs pass
unchanged, under the server's rules. Whether the bytes are audio is found out by whoever decodes them.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from tympan.answer import AnswerError

MAX_CHANNELS = 8
_URL_SCHEMES = ("http://", "https://", "data:")
_KEYS = ("audio", "audio_url")
_SUBTYPES = {"f4": "FLOAT", "f8": "DOUBLE", "i2": "PCM_16", "i4": "PCM_32"}


def inline_audio(messages: Any) -> Any:
    """A conversation whose local clips stand in it as base64. What is no conversation is left for the API to refuse.

    Raises AnswerError that names the part.
    """
    if not isinstance(messages, list | tuple):
        return messages
    return [
        {**message, "content": _inline_parts(content, f"messages[{turn}]")}
        if isinstance(message, Mapping) and isinstance(content := message.get("content"), list | tuple)
        else message
        for turn, message in enumerate(messages)
    ]


def audio_part(clip: Any, param: str) -> Mapping[str, Any]:
    """One clip, or a part that holds one, as a part of the API. Raises AnswerError."""
    if isinstance(clip, Mapping):
        return _part(clip, param)
    if isinstance(clip, str) and clip.lower().startswith(_URL_SCHEMES):
        return {"type": "audio_url", "audio_url": {"url": clip}}
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(_read(clip, param)).decode()}}


def _inline_parts(parts: Sequence[Any], param: str) -> list[Any]:
    return [_part(part, f"{param}.content[{index}]") for index, part in enumerate(parts)]


def _part(part: Any, param: str) -> Any:
    if not isinstance(part, Mapping) or part.get("type") != "audio":
        return part
    clips = [part[key] for key in _KEYS if part.get(key) is not None]
    return audio_part(clips[0], param) if len(clips) == 1 else part


def _read(clip: Any, param: str) -> bytes:
    match clip:
        case bytes() | bytearray() | memoryview():
            return bytes(clip)
        case str() | os.PathLike():
            try:
                return Path(clip).expanduser().read_bytes()
            except (OSError, ValueError) as error:
                reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
                message = f"The audio file {os.fspath(clip)!r} cannot be read: {reason}."
                raise AnswerError(message, param=param, code="audio_file_unreadable") from None
        case (samples, rate):
            return _wav(samples, rate, param)
    message = "Audio is a path, bytes, a pair (samples, sampling_rate) or a URL."
    raise AnswerError(message, param=param, code="invalid_type")


def _wav(samples: Any, rate: Any, param: str) -> bytes:
    """WAV of samples [S] or [S, channels], float in -1..1 or int16 or int32, bit for bit."""
    array: NDArray[Any] = np.asarray(samples)
    channels = array.shape[1] if array.ndim == 2 else 1
    if array.ndim not in (1, 2) or not 1 <= channels <= MAX_CHANNELS:
        shape = f"The audio array has shape {array.shape}; it must be [samples] or [samples, channels]."
        raise AnswerError(shape, param=param, code="invalid_value")
    subtype = _SUBTYPES.get(array.dtype.str[1:])
    if subtype is None:
        message = f"The audio array is {array.dtype}; it must be float32, float64, int16 or int32."
        raise AnswerError(message, param=param, code="invalid_type")
    try:
        hertz = int(rate)
    except (TypeError, ValueError, OverflowError):
        hertz = 0
    if hertz < 1 or hertz != rate or hertz >= 2**31:
        raise AnswerError("The sampling rate must be a whole number of Hz.", param=param, code="invalid_value")
    file = io.BytesIO()
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    soundfile.write(file, native, hertz, format="WAV", subtype=subtype)
    return file.getvalue()
