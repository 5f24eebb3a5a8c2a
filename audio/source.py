"""Where a clip comes from, as frozen values: inline base64, a link, or a file already in hand.

Base64 is read the way clients write it (a whole data: URL, no padding, the URL-safe alphabet, line
breaks) and no looser: a wrong character is an error, never skipped. It is read in pieces, so that no more of it
than a piece is in memory beside what holds it. Values keep their payload out of `repr`, so it stays out of logs.
Fetches nothing.
"""

import binascii
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import IO

import pybase64

from audio.errors import AudioSourceError
from audio.limits import MIB, AudioLimits
from audio.text_file import FiledText

_DATA_SCHEME = "data:"
_MAX_DATA_HEADER_CHARS = 512
_DATA_HEADER = re.compile(
    rb'data:(?:[\w.+-]+/[\w.+-]+)?(?:; ?[\w.+-]+=(?:"[^"]*"|[^;,"]*))*(?P<base64>;base64)?,', re.IGNORECASE
)
_TO_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")
_WHITESPACE = b" \t\r\n\f\v"
# Only what an encoder may escape: a general unquote of hostile text costs hundreds of bytes a character.
_PERCENT_ESCAPES = {b"%3D": b"=", b"%2B": b"+", b"%2F": b"/", b"%0A": b"", b"%0D": b"", b"%20": b""}

Text = str | FiledText


@dataclass(frozen=True, slots=True)
class InlineAudio:
    """Base64 text, or a data: URL. `declared_format` is the client's word: a hint that decides nothing."""

    data: Text = field(repr=False)
    declared_format: str | None = None


@dataclass(frozen=True, slots=True)
class AudioUrl:
    """A link: http, https, data: or file:. Not shown in full: presigned links carry their key."""

    url: Text = field(repr=False)


@dataclass(frozen=True, slots=True)
class AudioFile:
    """A seekable file as uploaded, the loader's until the clip is loaded. `declared_format` decides nothing."""

    file: IO[bytes] = field(repr=False)
    declared_format: str | None = None


AudioSource = InlineAudio | AudioUrl | AudioFile


def is_data_url(text: Text) -> bool:
    """Whether `text` is a data: URL rather than another link. Only data: URLs are long enough for a file."""
    return isinstance(text, FiledText) or text[: len(_DATA_SCHEME)].lower() == _DATA_SCHEME


def write_inline(text: Text, file: IO[bytes], limits: AudioLimits) -> None:
    """Write the file that base64 `text` holds, which may also be a whole data: URL. Raises as `write_data_url`."""
    pieces = _pieces(text)
    first = next(pieces, b"").lstrip()
    write = _write_data_url if first[: len(_DATA_SCHEME)].lower() == _DATA_SCHEME.encode() else _write_base64
    write(chain((first,), pieces), file, limits)


def write_data_url(url: Text, file: IO[bytes], limits: AudioLimits) -> None:
    """Write the file in a base64 data: URL; the media type is ignored.

    Raises AudioSourceError (`invalid_base64`, `audio_empty`; `invalid_audio_url` for a header that is malformed or
    not base64) or AudioLimitError `audio_too_large`.
    """
    _write_data_url(_pieces(url), file, limits)


def _pieces(text: Text) -> Iterator[bytes]:
    """In pieces that cost little memory, and between which other threads get the GIL."""
    try:
        if isinstance(text, FiledText):
            yield from text.pieces()
            return
        for start in range(0, len(text), MIB):
            yield text[start : start + MIB].encode("ascii")
    except ValueError:
        raise _invalid_base64() from None


def _write_data_url(pieces: Iterator[bytes], file: IO[bytes], limits: AudioLimits) -> None:
    first = next(pieces, b"")
    header = _DATA_HEADER.match(first, 0, _MAX_DATA_HEADER_CHARS)
    if header is None:
        raise AudioSourceError("invalid_audio_url", "The data: URL is malformed.")
    if header["base64"] is None:
        raise AudioSourceError("invalid_audio_url", "The data: URL must be base64-encoded.")
    _write_base64(chain((first[header.end() :],), pieces), file, limits)


def _write_base64(pieces: Iterator[bytes], file: IO[bytes], limits: AudioLimits) -> None:
    num_bytes = 0
    rest = b""
    for piece in pieces:
        rest += piece
        data, rest = _decode_most(rest)
        num_bytes += len(data)
        limits.check_clip_bytes(num_bytes)
        file.write(data)
    data = _decode_end(_normalize(rest))
    limits.check_clip_bytes(num_bytes + len(data))
    file.write(data)
    if not num_bytes + len(data):
        raise AudioSourceError("audio_empty", "The audio is empty.")


def _decode_most(text: bytes) -> tuple[bytes, bytes]:
    """What whole groups of four digits give, and the text that is left: the last group at least, or an escape."""
    for is_plain in (True, False):
        held = b""
        if not is_plain:
            if (escape := text.rfind(b"%", -2)) >= 0:  # it may go on in the next piece
                text, held = text[:escape], text[escape:]
            text = _normalize(text)
        end = max(0, len(text) - 1) // 4 * 4
        try:
            if b"=" not in text[max(0, end - 4) : end]:
                return pybase64.b64decode(memoryview(text)[:end], validate=True), text[end:] + held
        except (binascii.Error, ValueError):
            continue
    raise _invalid_base64()


def _decode_end(text: bytes) -> bytes:
    """Of the last group, padded or not."""
    digits = text.rstrip(b"=")
    num_padding = len(text) - len(digits)
    if num_padding > 2 or len(digits) % 4 == 1:
        raise _invalid_base64()
    try:
        return pybase64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise _invalid_base64() from None


def _normalize(text: bytes) -> bytes:
    """Plain base64. 25 MiB take 100 ms where the plain form needs a few."""
    if b"%" in text:
        for escape, meaning in _PERCENT_ESCAPES.items():
            text = text.replace(escape, meaning).replace(escape.lower(), meaning)
    return text.translate(_TO_STANDARD_ALPHABET, _WHITESPACE)


def _invalid_base64() -> AudioSourceError:
    return AudioSourceError("invalid_base64", "The audio data is not valid base64.")
