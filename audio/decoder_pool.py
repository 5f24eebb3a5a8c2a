"""The server's side of its decoders: files in, samples out, and no codec in this process.

A decoder has one job at a time. One that refuses a file, dies or overstays is replaced, so that nobody's file is
read by a process that a bad one may have damaged. Where a decoder dies that has had other jobs before, the job is
done once more by a new one: it may not have been this file that broke it. Clips share decoders that are kept; a long
file has one of its own until it is closed, which holds still between windows. Blocking, and safe to use from several
threads. Knows nothing of event loops.
"""

import logging
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from audio import decoder_channel as channel
from audio.decoder_channel import Decoded, DecoderDiedError, DecoderLateError, Job
from audio.errors import AudioDecodeError, AudioError
from audio.limits import MIB, AudioLimits, DecoderLimits
from audio.pcm import SAMPLE_RATE

logger = logging.getLogger(__name__)

DECODER_NICENESS = 5
"""Above the event loop's: where all cores are busy, a long file waits rather than everybody else."""

_SOURCES = Path(__file__).resolve().parent.parent
_NEEDED_VARIABLES = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
_REPLACED_AFTER = 1000
"""Jobs: what a decoder has not given back by then goes with it."""
_MAX_NICENESS = 19
_HOST_TIMEOUT_S = 60.0
_MAX_COPIED_BYTES = MIB
"""Of a file that may be in memory: a longer one is on disk, and handed over as it is if it has a descriptor."""
_SLACK_SAMPLES = SAMPLE_RATE
_BYTES_PER_SECOND = 2 * 4 * SAMPLE_RATE
"""Of address space for a clip's result: its blocks, and what lies between them."""


Tell = Callable[[float], None]


def _nobody(_: float) -> None:
    """Wants to know."""


class DecoderPool:
    """Decoders for clips under `limits`, and one for each long file. Starts with the first file, or `start`."""

    def __init__(self, limits: AudioLimits, of_processes: DecoderLimits | None = None) -> None:
        self._limits = limits
        self._of_processes = of_processes or DecoderLimits()
        memory = self._of_processes.memory_bytes + int(limits.max_clip_seconds * _BYTES_PER_SECOND)
        self._host = _Host(self._of_processes.cpu_s, memory)
        self._idle: list[_Decoder] = []

    def start(self, num_decoders: int = 0) -> None:
        """Load the codecs, and have some decoders ready."""
        self._host.start()
        for _ in range(num_decoders):
            self._idle.append(self._fork())

    def decode(self, file: IO[bytes], resampled: Tell = _nobody) -> NDArray[np.float32]:
        """The samples of a seekable file, mono at 16 kHz, read-only float32 [S].

        resampled: is told how long resampling took. Raises AudioDecodeError or AudioLimitError.
        """
        with _descriptor(file) as descriptor:
            decoder = self._take()
            while True:
                try:
                    decoded = self._decode(decoder, descriptor)
                    break
                except DecoderDiedError as death:
                    is_over_time = self._end(decoder) == signal.SIGPROF or isinstance(death, DecoderLateError)
                    if is_over_time or decoder.num_jobs == 1:
                        raise _undecodable() from None
                    decoder = self._fork()
        resampled(decoded.resample_s)
        return decoded.samples

    def windows(
        self, file: IO[bytes], limits: AudioLimits, max_samples: int, resampled: Tell = _nobody
    ) -> Generator[NDArray[np.float32], None, None]:
        """The windows of a seekable file, cut by `audio.segment` and decoded one at a time, as `decode` gives clips.

        The file must not be touched before the generator is closed. Raises AudioDecodeError or AudioLimitError.
        """
        with _descriptor(file) as descriptor:
            decoder = self._fork()
            try:
                decoder.begin(Job(limits, max_samples), descriptor)
                while (window := decoder.next_window(max_samples)) is not None:
                    resampled(window.resample_s)
                    yield window.samples
            except DecoderDiedError:
                raise _undecodable() from None
            finally:
                self._end(decoder)

    def close(self) -> None:
        """End all decoders. Whoever waits for one gets AudioDecodeError."""
        self._host.close()
        for decoder in self._idle:
            decoder.socket.close()
        self._idle.clear()

    def _decode(self, decoder: "_Decoder", file: int) -> Decoded:
        """Keeps the decoder for others if it deserves it. Raises AudioError, and DecoderDiedError before its end."""
        max_samples = int(self._limits.max_clip_seconds * SAMPLE_RATE) + _SLACK_SAMPLES
        try:
            decoded = decoder.decode(Job(self._limits), file, max_samples)
        except AudioError:
            self._end(decoder)
            raise
        if decoder.num_jobs < _REPLACED_AFTER:
            self._idle.append(decoder)
        else:
            self._end(decoder)
        return decoded

    def _take(self) -> "_Decoder":
        while True:
            try:
                decoder = self._idle.pop()  # the one used last: its memory is warm
            except IndexError:
                return self._fork()
            if decoder.is_alive():
                return decoder
            self._end(decoder)

    def _fork(self) -> "_Decoder":
        ours, theirs = socket.socketpair()
        with theirs:
            pid = self._host.ask(channel.FORK, 0, theirs.fileno())
        return _Decoder(pid, ours, self._of_processes.wall_s)

    def _end(self, decoder: "_Decoder") -> int:
        """-> the signal that ended it: SIGKILL, ours, if it had not ended before; 0 if it ended itself."""
        status = self._host.ask(channel.END, decoder.pid)
        decoder.socket.close()
        ended_by = os.WTERMSIG(status)
        if ended_by != signal.SIGKILL:
            cause = signal.Signals(ended_by).name if ended_by else f"an exception (status {os.WEXITSTATUS(status)})"
            logger.warning("an audio decoder was ended by %s", cause)
        return ended_by


class _Decoder:
    """One process. Not safe to share between threads. What asks it for something raises DecoderDiedError."""

    def __init__(self, pid: int, ours: socket.socket, wall_s: float) -> None:
        self.pid = pid
        self.socket = ours
        self.num_jobs = 0
        _set_timeout(ours, wall_s)

    def is_alive(self) -> bool:
        """Whether it waits for a job."""
        try:
            return bool(self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def decode(self, job: Job, descriptor: int, max_samples: int) -> Decoded:
        self.begin(job, descriptor)
        decoded = channel.receive_samples(self.socket, max_samples)
        if decoded is None:
            raise DecoderDiedError
        return decoded

    def begin(self, job: Job, descriptor: int) -> None:
        self.num_jobs += 1
        try:
            channel.send_job(self.socket, job, descriptor)
        except OSError:
            raise DecoderDiedError from None

    def next_window(self, max_samples: int) -> Decoded | None:
        try:
            channel.send_next(self.socket)
        except OSError:
            raise DecoderDiedError from None
        return channel.receive_samples(self.socket, max_samples)


class _Host:
    """The process that decoders are forked from. Started anew when it has died."""

    def __init__(self, cpu_s: float, memory_bytes: int) -> None:
        self._arguments = (str(cpu_s), str(memory_bytes))
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._is_closed = False

    def start(self) -> None:
        with self._lock:
            self._running()

    def ask(self, command: bytes, pid: int, descriptor: int | None = None) -> int:
        """Have a decoder forked or ended. -> its process id, or its wait status."""
        message = channel.COMMAND.pack(command, pid)
        with self._lock:
            for _ in range(2):
                control = self._running()
                try:
                    socket.send_fds(control, [message], [] if descriptor is None else [descriptor])
                    return int(channel.REPLY.unpack(control.recv(channel.REPLY.size, socket.MSG_WAITALL))[0])
                except (OSError, struct.error):
                    self._stop()
                    if command == channel.END:  # all of its decoders have ended too
                        return signal.SIGKILL
        raise RuntimeError("no process for decoding audio can be started")

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._stop()

    def _running(self) -> socket.socket:
        if self._control is None:
            if self._is_closed:
                raise _undecodable()
            self._control, theirs = socket.socketpair()
            with theirs:
                self._process = self._spawn(theirs.fileno())
            _set_timeout(self._control, _HOST_TIMEOUT_S)
            if not self._is_ready(self._control):
                self._stop()
                raise RuntimeError("the process for decoding audio does not start")
        return self._control

    def _is_ready(self, control: socket.socket) -> bool:
        try:
            return bool(control.recv(channel.REPLY.size, socket.MSG_WAITALL))
        except OSError:
            return False

    def _spawn(self, descriptor: int) -> subprocess.Popen[bytes]:
        # The process's own, not the calling thread's, which may be lower.
        niceness = min(os.getpriority(os.PRIO_PROCESS, os.getpid()) + DECODER_NICENESS, _MAX_NICENESS)
        environment = {name: os.environ[name] for name in _NEEDED_VARIABLES if name in os.environ}
        return subprocess.Popen(
            [sys.executable, "-m", "audio.decoder_process", str(descriptor), str(niceness), *self._arguments],
            cwd=_SOURCES,
            env=environment | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            pass_fds=(descriptor,),
            start_new_session=True,  # a Ctrl-C is the server's business
        )

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)  # its session: decoders too
            self._process.wait()
            self._process = None


def _set_timeout(of: socket.socket, seconds: float) -> None:
    """The kernel's own: with Python's, a receive of many bytes is many calls."""
    of.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6)))


@contextmanager
def _descriptor(file: IO[bytes]) -> Iterator[int]:
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    if num_bytes > _MAX_COPIED_BYTES and (descriptor := _own_descriptor(file)) is not None:
        yield descriptor
        return
    with _unnamed_file(num_bytes) as copy:
        shutil.copyfileobj(file, copy, MIB)
        copy.flush()
        yield copy.fileno()


def _own_descriptor(file: IO[bytes]) -> int | None:
    try:
        return file.fileno()
    except OSError:  # it is in memory
        return None


def _unnamed_file(num_bytes: int) -> IO[bytes]:
    if hasattr(os, "memfd_create") and num_bytes <= _MAX_COPIED_BYTES:
        return open(os.memfd_create("audio", os.MFD_CLOEXEC), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _undecodable() -> AudioDecodeError:
    return AudioDecodeError(
        "invalid_audio", "The audio could not be decoded: the file is damaged, or takes too much time or memory."
    )
