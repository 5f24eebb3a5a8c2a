"""The processes that read hostile files: a host that has the codecs loaded, and decoders forked from it.

`python -m audio.decoder_process FD`, with a control socket as FD. The host forks a decoder for each socket that it
is sent, in a few milliseconds, and reads no file itself. A decoder works off one job after another; it has an empty
environment, the root as its folder, no standard streams, no descriptor to spare while a job is under way (so it can
open nothing, network included), no right to write a file, start a process or leave a core, a bounded address space
and a bounded processor time for each step. It may die at any time: nobody else is hurt. All of them end with the
server, however that ends. Knows nothing of requests.
"""

import contextlib
import gc
import io
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import soundfile

from audio import decoder_channel as channel
from audio.decode import decode, decode_blocks, decode_whole
from audio.errors import AudioDecodeError, AudioError
from audio.limits import AudioLimits
from audio.resample import Stopwatch
from audio.segment import segment

_SOCKET = 3
_MAX_DESCRIPTORS = 5  # the standard three, the socket, and the file of the job
_FILE_BUFFER_BYTES = 256 * 1024


def main(control_descriptor: int, niceness: int, cpu_seconds: float, memory_bytes: int) -> None:
    """Serve until the server's end of the control socket is closed.

    cpu_seconds: of a step; memory_bytes: that a decoder may have beyond what it begins with.
    """
    os.setpriority(os.PRIO_PROCESS, 0, niceness)
    _warm_up()
    os.chdir("/")
    os.environ.clear()
    _drop_standard_streams()
    gc.collect()
    gc.freeze()  # a collection would touch, and so copy, all that decoders share
    with socket.socket(fileno=control_descriptor) as control:
        control.sendall(channel.REPLY.pack(0))
        _host(control, cpu_seconds, memory_bytes)


def _host(control: socket.socket, cpu_seconds: float, memory_bytes: int) -> None:
    children: set[int] = set()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, channel.COMMAND.size, 1)
        if len(message) < channel.COMMAND.size:
            break
        command, pid = channel.COMMAND.unpack(message)
        if command == channel.FORK:
            answer = _fork(control, descriptors[0], cpu_seconds, memory_bytes)
            children.add(answer)
        elif pid in children:
            children.remove(pid)
            answer = _end(pid)
        else:  # of a host before this one, and ended with it
            answer = signal.SIGKILL
        control.sendall(channel.REPLY.pack(answer))
    for pid in children:
        _end(pid)


def _fork(control: socket.socket, descriptor: int, cpu_seconds: float, memory_bytes: int) -> int:
    pid = os.fork()
    if pid:
        os.close(descriptor)
        return pid
    status = 1
    try:
        control.close()
        os.dup2(descriptor, _SOCKET)
        os.closerange(_SOCKET + 1, descriptor + 1)
        _bound(memory_bytes)
        _serve(socket.socket(fileno=_SOCKET), cpu_seconds)
        status = 0
    finally:
        os._exit(status)


def _end(pid: int) -> int:
    os.kill(
        pid, signal.SIGKILL
    )  # a child that has ended already keeps its own status, and its id until the next line
    return os.waitpid(pid, 0)[1]


def _bound(memory_bytes: int) -> None:
    """What no decoder can get round, whatever runs in it."""
    limits = {resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0, resource.RLIMIT_NPROC: 0}
    if (statm := Path("/proc/self/statm")).exists():
        limits[resource.RLIMIT_AS] = int(statm.read_text().split()[0]) * resource.getpagesize() + memory_bytes
    limits[resource.RLIMIT_NOFILE] = _MAX_DESCRIPTORS
    for name, value in limits.items():
        resource.setrlimit(name, (value, value))


def _serve(server: socket.socket, cpu_seconds: float) -> None:
    while received := channel.receive_job(server):
        job, descriptor = received
        with open(descriptor, "rb", buffering=_FILE_BUFFER_BYTES) as file:
            try:
                _work_off(server, job, file, cpu_seconds)
            except AudioError as error:
                channel.send_refusal(server, error)
            except MemoryError:
                message = "The audio could not be decoded: it takes too much memory."
                channel.send_refusal(server, AudioDecodeError("invalid_audio", message))


def _work_off(server: socket.socket, job: channel.Job, file: IO[bytes], cpu_seconds: float) -> None:
    watch = Stopwatch()
    if job.window_samples is None:
        with _timed(cpu_seconds):
            blocks = decode_whole(file, job.limits, watch)
        channel.send_samples(server, blocks, watch.take())
        return
    windows = segment(decode_blocks(file, job.limits, watch), job.window_samples)
    while channel.is_next_asked(server):
        with _timed(cpu_seconds):
            window = next(windows, None)
        if window is None:
            channel.send_end(server)
            return
        channel.send_samples(server, [window], watch.take())


@contextlib.contextmanager
def _timed(cpu_seconds: float) -> Iterator[None]:
    """The kernel ends this process when the step takes longer, native code or not."""
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _warm_up() -> None:
    """Decode by both libraries, so that decoders find all that they load and look up on first use."""
    for container, codec in (("WAV", "PCM_16"), ("OGG", "OPUS")):
        file = io.BytesIO()
        soundfile.write(file, np.zeros(8_000, np.float32), 8_000, format=container, subtype=codec)
        decode(file, AudioLimits())
    with contextlib.suppress(AudioError):
        decode(io.BytesIO(b"fLaC" + bytes(64)), AudioLimits())


def _drop_standard_streams() -> None:
    """Codecs print what hostile files make them say."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    os.close(nothing)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
