"""What makes an API key, and a file of them that is read again when it changes.

One key a line; empty lines and those that begin with # are none. Only hashes leave this module. A file that cannot
be read, or holds no key, or something that is no key, is refused at the start; later it changes nothing: the keys
that were good stay, and a log line says so. No file ever opens the server.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

CHECK_SECONDS = 2.0
"""Between two looks at the file."""
MAX_FILE_BYTES = 1 << 20

logger = logging.getLogger(__name__)


class KeysError(Exception):
    """The operator's API keys cannot be used. One sentence for the operator; it holds no key."""


def digest_of(key: str, place: str) -> bytes:
    """A key's hash. Raises KeysError, which names `place` and not the key, for what no header could carry."""
    if not key:
        raise KeysError(f"{place}: a key is empty")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise KeysError(f"{place}: a key has characters other than printable ASCII without spaces")
    return hashlib.sha256(key.encode()).digest()


class KeyFile:
    """The keys of a file, as it is now."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises KeysError when the file is not fit for use."""
        self._path = path
        self._clock = clock
        self._checked = clock()
        self._stamp = self._look()
        self._digests = self._read()
        self._told = ""
        """What is wrong with the file now, if that was logged."""

    def digests(self) -> tuple[bytes, ...]:
        """Hashes of the keys; never none. Looks at the file every few seconds."""
        if self._clock() - self._checked >= CHECK_SECONDS:
            self._checked = self._clock()
            self._refresh()
        return self._digests

    def _refresh(self) -> None:
        try:
            stamp = self._look()
            if stamp == self._stamp:
                return
            self._stamp = stamp
            self._digests = self._read()
            logger.info("read the API keys again: %d", len(self._digests))
        except KeysError as error:
            if str(error) != self._told:
                logger.error("%s; the keys read before stay valid", error)
            self._told = str(error)
        else:
            self._told = ""

    def _look(self) -> tuple[int, int, int]:
        """What changes when the file does."""
        try:
            found = os.stat(self._path)
        except OSError as error:
            raise self._unreadable(error) from error
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_FILE_BYTES:
            raise KeysError(f"api-key-file: {self._path} is no file of at most {MAX_FILE_BYTES} bytes")
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _read(self) -> tuple[bytes, ...]:
        try:
            with self._path.open("rb") as file:
                lines = file.read(MAX_FILE_BYTES).decode().splitlines()
        except OSError as error:
            raise self._unreadable(error) from error
        except UnicodeDecodeError:
            raise KeysError(f"api-key-file: {self._path} is no UTF-8 text") from None
        keys = [(number, line.strip()) for number, line in enumerate(lines, 1)]
        digests = tuple(
            digest_of(key, f"api-key-file: {self._path}: line {number}")
            for number, key in keys
            if key and not key.startswith("#")
        )
        if not digests:
            raise KeysError(f"api-key-file: {self._path} holds no key")
        return digests

    def _unreadable(self, error: OSError) -> KeysError:
        return KeysError(f"api-key-file: {self._path} cannot be read: {error.strerror}")
