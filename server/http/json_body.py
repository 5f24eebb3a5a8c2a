"""A JSON body read piece by piece, its long strings put aside to a file: base64 never lies in memory.

What is kept is the body with a mark in place of each long string. It is bounded, and what it becomes when parsed is
too. Strings that are no audio come back into memory, within the same bound. Knows quotes and escapes of JSON and
where audio stands, and of requests nothing else.
"""

from __future__ import annotations

import secrets
import sys
from typing import Any

from pydantic_core import from_json

from audio import FiledText, TextFile
from server.errors import ApiError, bad_request

PIECE_BYTES = 16 << 10
LONG_STRING_BYTES = 32 << 10
"""Longer ones are put aside, where they are not within one piece."""
MAX_TEXT_BYTES = 8 << 20
"""Of a body, audio aside: far more than any context takes."""
MAX_JSON_VALUES = 300_000
"""Of a body, about: parsed, a value takes hundreds of bytes for the two that it has here. Base64 holds none."""
MAX_JSON_OBJECTS = 50_000
"""Of a body, about: validated, each is worth twenty other values."""
VALUE_BYTES = 64
"""What a parsed value takes of memory beside its text, about."""
MAX_CHAR_BYTES = 4
"""Of each character of a string in memory that has an emoji."""


class JsonReader:
    """Takes a body's bytes, then gives its values. Blocking once it has begun to put something aside."""

    def __init__(self) -> None:
        self._kept = bytearray()
        self._is_in_string = False
        self._last_quote = 0
        """Where in what is kept its last string begins or has ended."""
        self._file: TextFile | None = None
        self._aside_from: int | None = None
        """Where in the file the string begins that is being put aside."""
        self._texts: list[FiledText] = []
        self._mark = secrets.token_hex(16)
        """What no client can write."""
        self._num_parsed_bytes = 0
        self._cut_escape = b""
        """A backslash at the end of what has come."""
        self._num_text_bytes = 0

    @property
    def is_small(self) -> bool:
        """Whether its values take no memory worth counting."""
        return self._file is None and len(self._kept) <= LONG_STRING_BYTES

    @property
    def num_memory_bytes(self) -> int:
        """Held by now."""
        return len(self._kept) + self._num_parsed_bytes

    @property
    def num_disk_bytes(self) -> int:
        """In the file by now."""
        return self._file.num_bytes if self._file else 0

    def write(self, chunk: bytes) -> None:
        """Raises ApiError (413), and OSError when the disk is full."""
        for start in range(0, len(chunk), PIECE_BYTES):
            self._take(self._cut_escape + chunk[start : start + PIECE_BYTES])

    def values(self) -> Any:
        """The parsed body, with `FiledText` where audio was put aside. Ends the reading.

        Raises ApiError for what is no JSON or too much of it.
        """
        if self._aside_from is not None:
            raise unparsable()
        num_values = self._check_number()
        try:
            # Not model_validate_json: each union that looks at a part before it chooses would copy it.
            values = from_json(self._kept)
        except ValueError as error:
            if "recursion limit" in str(error):
                raise bad_request("The JSON body is nested too deeply.", code="json_too_deep") from None
            raise unparsable() from None
        is_plain = self._kept.isascii() and rb"\u" not in self._kept
        self._num_parsed_bytes = num_values * VALUE_BYTES + len(self._kept) * (1 if is_plain else MAX_CHAR_BYTES)
        self._num_text_bytes = len(self._kept)
        self._kept.clear()
        return self._filled(values, "", "") if self._texts else values

    def _take(self, piece: bytes) -> None:
        masked = piece.replace(rb"\\", b"xx").replace(rb"\"", b"xx")
        self._cut_escape = b"\\" if masked.endswith(b"\\") else b""
        end = len(piece) - len(self._cut_escape)
        start = 0
        if self._aside_from is not None:
            assert self._file is not None, "it is opened with the first string"
            start = masked.find(b'"', 0, end)
            self._file.write(memoryview(piece)[: start if start >= 0 else end])
            if start < 0:
                return
            self._kept += f"{self._mark}{len(self._texts)}".encode()
            self._texts.append(FiledText(self._file, self._aside_from, self._file.num_bytes))
            self._aside_from = None
        if num_quotes := masked.count(b'"', start, end):
            self._is_in_string ^= num_quotes % 2 == 1
            self._last_quote = len(self._kept) + masked.rfind(b'"', start, end) - start
        self._kept += memoryview(piece)[start:end]
        if self._is_in_string and len(self._kept) - self._last_quote > LONG_STRING_BYTES:
            self._put_aside()
        if len(self._kept) > MAX_TEXT_BYTES:
            raise _too_much_text()

    def _put_aside(self) -> None:
        if self._file is None:
            self._file = TextFile()
        self._aside_from = self._file.num_bytes
        begin = self._last_quote + 1
        self._file.write(self._kept[begin:])
        del self._kept[begin:]

    def _check_number(self) -> int:
        num_objects = self._kept.count(b"{")
        num_values = num_objects + self._kept.count(b",") + self._kept.count(b"[")
        if num_values > MAX_JSON_VALUES or num_objects > MAX_JSON_OBJECTS:
            raise ApiError(413, "The request body holds too many values.", code="request_too_large")
        return num_values

    def _filled(self, value: Any, key: str, parent_key: str) -> Any:
        """The value under `key`, of an object that is the value of `parent_key`."""
        if isinstance(value, dict):
            if any(name.startswith(self._mark) for name in value):
                raise bad_request("The JSON body has a key that is too long.")
            return {name: self._filled(item, name, key) for name, item in value.items()}
        if isinstance(value, list):
            return [self._filled(item, key, parent_key) for item in value]
        if not (isinstance(value, str) and value.startswith(self._mark)):
            return value
        text = self._texts[int(value.removeprefix(self._mark))]
        return text if _is_audio(key, parent_key) else self._restored(text)

    def _restored(self, text: FiledText) -> str:
        self._num_text_bytes += text.num_bytes
        if self._num_text_bytes > MAX_TEXT_BYTES:
            raise _too_much_text()
        try:
            restored = str(from_json(text.quoted()))
        except ValueError:
            raise unparsable() from None
        self._num_parsed_bytes += sys.getsizeof(restored)
        return restored


def _is_audio(key: str, parent_key: str) -> bool:
    """Where audio parts have their base64 (server/requests/content_parts.py)."""
    return (parent_key, key) in (("input_audio", "data"), ("audio_url", "url")) or key in ("audio_url", "audio")


def unparsable() -> ApiError:
    """A 400."""
    hint = "the body must be one JSON object in UTF-8"
    return bad_request(f"We could not parse the JSON body of your request. (HINT: {hint}.)")


def _too_much_text() -> ApiError:
    message = f"The request body is too large: at most {MAX_TEXT_BYTES} bytes are accepted beside audio."
    return ApiError(413, message, code="request_too_large", headers={"Connection": "close"})
