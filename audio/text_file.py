"""Long strings of a request's JSON that lie in a file instead of in memory: base64, mostly.

A `TextFile` is the file of one request: unnamed, on disk, gone when nobody refers to it or to one of its texts any
more. A `FiledText` is a stretch of it, as the string stood between its quotes, escapes and all. Reading is safe from
several threads. Knows nothing of requests.
"""

import json
import os
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

from audio.limits import MIB

_ESCAPE_BYTES = len(r"\u002b")


class TextFile:
    """Written from its beginning to its end, by one thread at a time."""

    def __init__(self) -> None:
        with tempfile.TemporaryFile(buffering=0) as file:
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self.num_bytes = 0
        """Written so far."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append. Raises OSError where the disk is full."""
        view = memoryview(data)
        while len(view):
            num_written = os.pwrite(self._descriptor, view, self.num_bytes)
            self.num_bytes += num_written
            view = view[num_written:]

    def read(self, begin: int, end: int) -> bytes:
        """The bytes from `begin` to `end`; fewer, but some, where the system reads no more at once."""
        return os.pread(self._descriptor, end - begin, begin)


@dataclass(frozen=True, slots=True)
class FiledText:
    """What stands from `begin` to `end` in a file."""

    file: TextFile = field(repr=False)
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """In the file: at least as many as the text has characters."""
        return self.end - self.begin

    def quoted(self) -> bytearray:
        """All of it in memory, as it stands in the file, between quotes."""
        quoted = bytearray(b'"')
        for piece in self._raw_pieces():
            quoted += piece
        quoted += b'"'
        return quoted

    def pieces(self) -> Iterator[bytes]:
        """The text, which must be ASCII, in pieces of about a mebibyte. Raises ValueError for any other."""
        rest = b""
        for piece in self._raw_pieces():
            raw = rest + piece
            cut = raw.rfind(b"\\", max(0, len(raw) - _ESCAPE_BYTES + 1))  # the beginning of an escape, perhaps
            if cut < 0:
                cut = len(raw)
            elif raw[cut - 1 : cut] == b"\\":
                raise ValueError("a backslash")
            rest = raw[cut:]
            yield _unescaped(raw[:cut])
        if rest:
            yield _unescaped(rest)

    def _raw_pieces(self) -> Iterator[bytes]:
        at = self.begin
        while at < self.end:
            piece = self.file.read(at, min(self.end, at + MIB))
            at += len(piece)
            yield piece


def _unescaped(raw: bytes) -> bytes:
    return str(json.loads(b'"%b"' % raw)).encode("ascii")
