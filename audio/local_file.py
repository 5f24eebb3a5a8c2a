"""Files of the server's own disk, for file: URLs, from one folder that the operator has named.

A path is resolved, must lie in the folder, and is then opened piece by piece without following a link, so that
nothing can be exchanged in between. Only regular files are read: no folder, pipe, socket or device. Whatever else
is wrong with a path, one answer says it, or clients could list what is on the disk.
"""

import os
import stat
from pathlib import Path
from typing import IO
from urllib.parse import unquote_to_bytes, urlsplit

from audio.errors import AudioFetchError, AudioSourceError
from audio.limits import AudioLimits

_FILE_SCHEME = "file:"
_MAX_URL_CHARS = 8192
_OWN_HOSTS = ("", "localhost")


def is_file_url(text: str) -> bool:
    """Whether `text` is a file: URL."""
    return text[: len(_FILE_SCHEME)].lower() == _FILE_SCHEME


class LocalFiles:
    """The files in and below `folder`."""

    def __init__(self, folder: Path, limits: AudioLimits) -> None:
        self._folder = Path(os.path.realpath(folder))
        self._limits = limits

    def open(self, url: str) -> IO[bytes]:
        """The file behind a file: URL, open to be read. Blocking.

        Raises AudioSourceError `invalid_audio_url`, AudioFetchError `media_url_refused` or AudioLimitError
        `audio_too_large`.
        """
        try:
            descriptor = self._descriptor(_path_of(url))
        except (OSError, ValueError):
            raise _refused() from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise _refused()
            self._limits.check_clip_bytes(status.st_size)
            return open(descriptor, "rb")
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, OSError):
                raise _refused() from None
            raise

    def _descriptor(self, path: str) -> int:
        """Raises OSError, or ValueError for a path that leads out of the folder."""
        *folders, name = Path(os.path.realpath(path)).relative_to(self._folder).parts or ("",)
        parent = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for folder in folders:
                child = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
                os.close(parent)
                parent = child
            # Without O_NONBLOCK a pipe would be waited for.
            return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        finally:
            os.close(parent)


def _path_of(url: str) -> str:
    if len(url) > _MAX_URL_CHARS:
        raise _invalid()
    try:
        parts = urlsplit(url)
        path = os.fsdecode(unquote_to_bytes(parts.path))
    except ValueError:
        raise _invalid() from None
    if parts.netloc.lower() not in _OWN_HOSTS or not path.startswith("/") or "\0" in path:
        raise _invalid()
    return path


def _refused() -> AudioFetchError:
    return AudioFetchError("media_url_refused", "The file: URL names no file that this server may read.")


def _invalid() -> AudioSourceError:
    return AudioSourceError("invalid_audio_url", "The file: URL is malformed, or names another host.")
