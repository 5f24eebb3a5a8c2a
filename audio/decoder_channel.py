"""What crosses between the server and its decoders: jobs one way, samples or refusals the other. No pickle.

Frames on a Unix socket: a header, then JSON or raw float32. A job brings its file as an open
descriptor, so that a decoder needs no name to open. A decoder may have been taken over by the file that it read:
`receive` takes no more than a frame may hold, and of a refusal only one of the two kinds that decoding has.
"""

import json
import math
import socket
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from audio.errors import AudioDecodeError, AudioError, AudioLimitError
from audio.limits import AudioLimits

COMMAND = struct.Struct("<ci")
"""To the host of the decoders: what to do, and with which process."""
FORK, END = b"f", b"e"
REPLY = struct.Struct("<i")
"""From the host: a new process's id, or the wait status of one that was ended; once, at first, that it is ready."""

_SAMPLE_BYTES = np.dtype(np.float32).itemsize
_MAX_TEXT_BYTES = 4096
_HEADER = struct.Struct("<BQd")
"""Kind, bytes that follow, and of samples the seconds that resampling took."""
_REFUSALS: dict[str, type[AudioError]] = {kind.__name__: kind for kind in (AudioDecodeError, AudioLimitError)}


class DecoderDiedError(Exception):
    """A decoder has gone, or talks nonsense."""


class DecoderLateError(DecoderDiedError):
    """It does not answer."""


class Kind(IntEnum):
    """Of a frame."""

    JOB = 1
    NEXT = 2
    """Asks for the next window of a job that has them."""
    SAMPLES = 3
    """Of a window, or of a job without windows."""
    END = 4
    """There is no further window."""
    REFUSED = 5


@dataclass(frozen=True, slots=True)
class Job:
    """A file to decode, whole or as windows of at most `window_samples`, each when it is asked for."""

    limits: AudioLimits
    window_samples: int | None = None


def send_job(to: socket.socket, job: Job, descriptor: int) -> None:
    """The job and its file. Raises OSError when the decoder has gone."""
    text = json.dumps({"limits": asdict(job.limits), "window_samples": job.window_samples}).encode()
    socket.send_fds(to, [_header(Kind.JOB, len(text)) + text], [descriptor])


def receive_job(source: socket.socket) -> tuple[Job, int] | None:
    """The next job and the descriptor of its file; None when the server has gone."""
    data, descriptors, _, _ = socket.recv_fds(source, _HEADER.size + _MAX_TEXT_BYTES, 1)
    if not data:
        return None
    fields = json.loads(data[_HEADER.size :])
    return Job(AudioLimits(**fields["limits"]), fields["window_samples"]), descriptors[0]


def send_next(to: socket.socket) -> None:
    """Ask for a window. Raises OSError when the decoder has gone."""
    to.sendall(_header(Kind.NEXT))


def is_next_asked(source: socket.socket) -> bool:
    """Wait until a window is wanted; False when nobody wants one any more."""
    return len(source.recv(_HEADER.size, socket.MSG_WAITALL)) == _HEADER.size


def send_samples(to: socket.socket, blocks: Sequence[NDArray[np.float32]], resample_s: float = 0.0) -> None:
    """All samples of a window or job, float32 [S] in consecutive blocks."""
    to.sendall(_header(Kind.SAMPLES, sum(block.nbytes for block in blocks), resample_s))
    for block in blocks:
        to.sendall(np.ascontiguousarray(block).data.cast("B"))


def send_end(to: socket.socket) -> None:
    """No further window."""
    to.sendall(_header(Kind.END))


def send_refusal(to: socket.socket, error: AudioError) -> None:
    """What is wrong with the file."""
    text = json.dumps([type(error).__name__, error.code, error.message]).encode()
    to.sendall(_header(Kind.REFUSED, len(text)) + text)


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a decoder made of a file, or of the next window of one."""

    samples: NDArray[np.float32]
    """[S], read-only."""
    resample_s: float
    """As the decoder says: that resampling took."""


def receive_samples(source: socket.socket, max_samples: int) -> Decoded | None:
    """The answer to a job without windows, or the next window; None after the last.

    Raises AudioError if the file was refused, DecoderDiedError if there is no answer or one of over `max_samples`.
    """
    kind, num_bytes, resample_s = _HEADER.unpack(_exactly(source, _HEADER.size))
    if kind == Kind.REFUSED and num_bytes <= _MAX_TEXT_BYTES:
        raise _refusal(_exactly(source, num_bytes))
    if kind == Kind.END:
        return None
    if kind != Kind.SAMPLES or num_bytes % _SAMPLE_BYTES or num_bytes > max_samples * _SAMPLE_BYTES:
        raise DecoderDiedError
    samples = np.empty(num_bytes // _SAMPLE_BYTES, np.float32)  # takes memory as it is filled
    _fill(source, samples.data.cast("B"))
    samples.setflags(write=False)
    return Decoded(samples, max(0.0, resample_s) if math.isfinite(resample_s) else 0.0)


def _header(kind: Kind, num_bytes: int = 0, resample_s: float = 0.0) -> bytes:
    return _HEADER.pack(kind, num_bytes, resample_s)


def _refusal(text: bytes) -> AudioError:
    try:
        kind, code, message = json.loads(text)
        return _REFUSALS[kind](str(code), str(message))
    except (ValueError, KeyError, TypeError):
        raise DecoderDiedError from None


def _exactly(source: socket.socket, num_bytes: int) -> bytes:
    buffer = bytearray(num_bytes)
    _fill(source, memoryview(buffer))
    return bytes(buffer)


def _fill(source: socket.socket, buffer: memoryview) -> None:
    """One system call in the usual case: each further one would wait for the GIL."""
    while len(buffer):
        try:
            num_received = source.recv_into(buffer, len(buffer), socket.MSG_WAITALL)
        except BlockingIOError:  # after the socket's own timeout
            raise DecoderLateError from None
        except OSError:
            num_received = 0
        if not num_received:
            raise DecoderDiedError
        buffer = buffer[num_received:]
