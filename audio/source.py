"""Where a clip comes from, as frozen values: inline base64, a link, or bytes already in hand.

Base64 is read the way clients write it (a whole data: URL, no padding, the URL-safe alphabet, line
breaks) and no looser: a wrong character is an error, never skipped. Sizes are known before a byte is
decoded. Values keep their payload out of `repr`, so it stays out of logs. Fetches nothing.
"""

import binascii
import re
from dataclasses import dataclass, field

import pybase64

from audio.errors import AudioError, AudioSourceError
from audio.limits import MIB, AudioLimits

_DATA_SCHEME = "data:"
_MAX_DATA_HEADER_CHARS = 512
_DATA_HEADER = re.compile(
    r'data:(?:[\w.+-]+/[\w.+-]+)?(?:; ?[\w.+-]+=(?:"[^"]*"|[^;,"]*))*(?P<base64>;base64)?,',
    re.ASCII | re.IGNORECASE,
)
_TO_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")
_WHITESPACE = b" \t\r\n\f\v"
# Only what an encoder may escape: a general unquote of hostile text costs hundreds of bytes a character.
_PERCENT_ESCAPES = {b"%3D": b"=", b"%2B": b"+", b"%2F": b"/", b"%0A": b"", b"%0D": b"", b"%20": b""}


@dataclass(frozen=True, slots=True)
class InlineAudio:
    """Base64 text, or a data: URL. `declared_format` is the client's word: a hint that decides nothing."""

    data: str = field(repr=False)
    declared_format: str | None = None


@dataclass(frozen=True, slots=True)
class AudioUrl:
    """A link: http, https, data: or file:. Not shown in full: presigned links carry their key."""

    url: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class AudioBytes:
    """A file as uploaded. `declared_format` is a hint that decides nothing."""

    data: bytes = field(repr=False)
    declared_format: str | None = None


AudioSource = InlineAudio | AudioUrl | AudioBytes


def is_data_url(text: str) -> bool:
    """Whether `text` is a data: URL rather than bare base64 or another link."""
    return text[: len(_DATA_SCHEME)].lower() == _DATA_SCHEME


def decode_inline(text: str, limits: AudioLimits) -> bytes:
    """The file in base64 `text`, which may also be a whole data: URL. Raises as the two below."""
    text = text if not text[:1].isspace() else text.lstrip()
    return decode_data_url(text, limits) if is_data_url(text) else decode_base64(text, limits)


def decode_data_url(url: str, limits: AudioLimits) -> bytes:
    """The file in a base64 data: URL; the media type is ignored. Raises as `decode_base64`, or
    AudioSourceError `invalid_audio_url` for a header that is malformed or not base64."""
    header = _DATA_HEADER.match(url, 0, _MAX_DATA_HEADER_CHARS)
    if header is None:
        raise AudioSourceError("invalid_audio_url", "The data: URL is malformed.")
    if header["base64"] is None:
        raise AudioSourceError("invalid_audio_url", "The data: URL must be base64-encoded.")
    return decode_base64(url[header.end() :], limits)


def decode_base64(text: str, limits: AudioLimits) -> bytes:
    """The bytes in `text`. Raises AudioSourceError (`invalid_base64`, `audio_empty`) or AudioLimitError
    `audio_too_large`, the latter before anything is decoded."""
    try:
        return _decode_plain(text, limits)
    except AudioError:
        return _decode_plain(_normalize(text), limits)


def _decode_plain(text: str | bytearray, limits: AudioLimits) -> bytes:
    tail = text[-3:]  # looked at apart: stripping would copy the whole clip
    num_padding = len(tail) - len(tail.rstrip("=") if isinstance(tail, str) else tail.rstrip(b"="))
    num_digits = len(text) - num_padding
    if not num_digits and num_padding <= 2:
        raise AudioSourceError("audio_empty", "The audio is empty.")
    if num_padding > 2 or num_digits % 4 == 1:
        raise _invalid_base64()
    limits.check_clip_bytes(num_digits * 3 // 4)
    if len(text) % 4:
        num_missing = -num_digits % 4
        if isinstance(text, str):
            text = text[:num_digits] + "=" * num_missing
        else:
            text = text[:num_digits] + b"=" * num_missing
    try:
        return pybase64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _invalid_base64() from None


def _normalize(text: str) -> bytearray:
    """In pieces, which cost little memory, and between which other threads get the GIL: 25 MiB take 100 ms where the
    plain form needs a few."""
    plain = bytearray()
    end = 0
    while end < len(text):
        start, end = end, end + MIB
        if end < len(text):  # not within an escape
            end -= 1 if text[end - 1] == "%" else 2 if text[end - 2] == "%" else 0
        try:
            piece = text[start:end].encode("ascii")
        except UnicodeEncodeError:
            raise _invalid_base64() from None
        if b"%" in piece:
            for escape, meaning in _PERCENT_ESCAPES.items():
                piece = piece.replace(escape, meaning).replace(escape.lower(), meaning)
        plain += piece.translate(_TO_STANDARD_ALPHABET, _WHITESPACE)
    return plain


def _invalid_base64() -> AudioSourceError:
    return AudioSourceError("invalid_base64", "The audio data is not valid base64.")
