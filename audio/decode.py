"""Any supported file to 16 kHz mono, block by block or whole: the only place where hostile bytes meet native codecs.

Every limit is enforced on the decoded block in hand, before the next one is asked for, because a
header may lie and a megabyte of FLAC can hold ten hours. Channels are mixed by their mean, here and
per block. Imported by `audio.decoder_process` alone: the server has no codec loaded. Does not know where bytes came
from.
"""

import io
import math
import os
from collections.abc import Iterator
from typing import IO

import numpy as np
import soundfile
from numpy.typing import NDArray

from audio.errors import AudioDecodeError, AudioError, AudioLimitError
from audio.ffmpeg import CODEC_ERRORS, read_blocks
from audio.limits import AudioLimits
from audio.resample import Stopwatch, StreamResampler
from audio.sniff import NUM_SNIFFED_BYTES, SUPPORTED_FORMATS, Container, sniff

_BLOCK_FRAMES = 65_536  # 2 MiB of float32 at eight channels
_UNKNOWN_FRAMES = 2**62  # libsndfile's marker for "not in the header" is near 2^63
_HEADER_SLACK_S = 1.0  # encoder padding may make a header overstate a clip that is in bounds
# Integer-valued float files reach 2^31; far beyond that the power spectrum overflows float32.
_MAX_AMPLITUDE = 2.0**32


def decode(file: IO[bytes], limits: AudioLimits) -> NDArray[np.float32]:
    """Decode a seekable file to 16 kHz mono, float32 [S] with at least one sample.

    Raises AudioDecodeError (`audio_empty`, `unsupported_audio`, `invalid_audio`) or AudioLimitError
    (`audio_too_large`, `audio_too_long`, `unsupported_audio`), and nothing else for any input.
    """
    return np.concatenate(decode_whole(file, limits))


def decode_whole(file: IO[bytes], limits: AudioLimits, watch: Stopwatch | None = None) -> list[NDArray[np.float32]]:
    """The same in consecutive blocks: in one piece a long clip would take its memory twice. Raises as `decode`.

    watch: counts the time that resampling takes.
    """
    container = _check(file, limits)
    if container.is_soundfile_first:
        try:
            return list(_read_with_soundfile(file, limits, watch))
        except AudioDecodeError:
            file.seek(0)  # FFmpeg reads more codecs in these containers, and files without a length
    return list(_read_with_ffmpeg(file, container.demuxers, limits, watch))


def decode_blocks(
    file: IO[bytes], limits: AudioLimits, watch: Stopwatch | None = None
) -> Iterator[NDArray[np.float32]]:
    """Decode a seekable file to blocks of 16 kHz mono, float32 [S], holding one at a time. Raises as `decode`.

    Put end to end they are what `decode` gives, but for a file that libsndfile gives up midway: FFmpeg gets its
    turn only while nothing has been yielded.
    """
    container = _check(file, limits)
    if container.is_soundfile_first:
        has_begun = False
        try:
            for block in _read_with_soundfile(file, limits, watch):
                has_begun = True
                yield block
            return
        except AudioDecodeError:
            if has_begun:
                raise
            file.seek(0)
    yield from _read_with_ffmpeg(file, container.demuxers, limits, watch)


def _check(file: IO[bytes], limits: AudioLimits) -> Container:
    """What the first bytes say the file is. Leaves it at its start."""
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    if not num_bytes:
        raise AudioDecodeError("audio_empty", "The audio is empty.")
    limits.check_clip_bytes(num_bytes)
    container = sniff(file.read(NUM_SNIFFED_BYTES))
    file.seek(0)
    if container is None:
        raise AudioDecodeError(
            "unsupported_audio", f"The audio is in no supported format. Supported: {SUPPORTED_FORMATS}."
        )
    return container


class _MonoSink:
    """Checks each decoded block against the limits, mixes it and resamples it."""

    def __init__(self, sample_rate: int, num_channels: int, limits: AudioLimits, watch: Stopwatch | None) -> None:
        if not limits.min_sample_rate <= sample_rate <= limits.max_sample_rate:
            raise AudioLimitError(
                "unsupported_audio",
                f"The sample rate must be from {limits.min_sample_rate} to {limits.max_sample_rate} Hz.",
            )
        if not 1 <= num_channels <= limits.max_channels:
            raise AudioLimitError("unsupported_audio", f"The audio must have 1 to {limits.max_channels} channels.")
        self._limits = limits
        self._sample_rate = sample_rate
        self._num_channels = num_channels
        self._num_frames = 0
        self._max_frames = min(
            math.floor(limits.max_clip_seconds * sample_rate),
            limits.max_decoded_bytes // (num_channels * np.dtype(np.float32).itemsize),
        )
        self._weights = np.full(num_channels, 1 / num_channels, np.float32)
        self._resampler = StreamResampler(sample_rate, watch)

    def announce(self, num_frames: int) -> None:
        """Refuse at once what a header says is far too long. Too little is never taken on trust."""
        if num_frames > self._max_frames + _HEADER_SLACK_S * self._sample_rate:
            raise self._too_long()

    def write(self, block: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
        """Take float32 [num_frames, num_channels], yield what it gives; the array may be reused by the caller."""
        num_frames, num_channels = block.shape
        if num_channels != self._num_channels:
            raise AudioDecodeError("invalid_audio", "The audio changes its number of channels midway.")
        if not num_frames:
            return
        self._num_frames += num_frames
        if self._num_frames > self._max_frames:
            raise self._too_long()
        # A product with 1/channels costs a thirtieth of numpy's mean over the short axis. One channel
        # is copied because the reader reuses its buffer.
        mono = block[:, 0].copy() if num_channels == 1 else block @ self._weights
        if not np.abs(mono).max() <= _MAX_AMPLITUDE:  # false for NaN too
            raise AudioDecodeError("invalid_audio", "The audio holds samples that are not finite.")
        resampled = self._resampler.push(mono)
        if len(resampled):
            yield resampled

    def finish(self) -> Iterator[NDArray[np.float32]]:
        if not self._num_frames:
            raise AudioDecodeError("audio_empty", "The audio holds no samples.")
        rest = self._resampler.finish()
        if len(rest):
            yield rest

    def _too_long(self) -> AudioLimitError:
        max_seconds = self._max_frames / self._sample_rate
        return AudioLimitError("audio_too_long", f"The audio is longer than the limit of {max_seconds:g} seconds.")


class _ForgivingFile:
    """Stays put on an impossible seek: an exception cannot cross libsndfile, and would go to stderr."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.read = file.read
        self.tell = file.tell

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        try:
            return self._file.seek(offset, whence)
        except (ValueError, OverflowError, OSError):
            return self._file.tell()


def _read_with_soundfile(
    file: IO[bytes], limits: AudioLimits, watch: Stopwatch | None
) -> Iterator[NDArray[np.float32]]:
    try:
        with soundfile.SoundFile(_ForgivingFile(file)) as sound:
            sink = _MonoSink(sound.samplerate, sound.channels, limits, watch)
            if sound.frames < _UNKNOWN_FRAMES:
                sink.announce(sound.frames)
            buffer = np.empty((_BLOCK_FRAMES, sound.channels), np.float32)
            while len(block := sound.read(out=buffer)):
                yield from sink.write(block)
            yield from sink.finish()
    except AudioError:
        raise
    except (soundfile.SoundFileError, *CODEC_ERRORS):
        raise _undecodable() from None  # its text holds the buffer's memory address


def _read_with_ffmpeg(
    file: IO[bytes], demuxers: str, limits: AudioLimits, watch: Stopwatch | None
) -> Iterator[NDArray[np.float32]]:
    sink: _MonoSink | None = None
    rate = 0
    try:
        for sample_rate, block in read_blocks(file, demuxers):
            if sink is None:
                sink, rate = _MonoSink(sample_rate, block.shape[1], limits, watch), sample_rate
            if sample_rate != rate:
                raise AudioDecodeError("invalid_audio", "The audio changes its sample rate midway.")
            yield from sink.write(block)
    except AudioError:
        raise
    except CODEC_ERRORS:
        raise _undecodable() from None
    if sink is None:
        raise AudioDecodeError("audio_empty", "The audio holds no samples.")
    yield from sink.finish()


def _undecodable() -> AudioDecodeError:
    return AudioDecodeError(
        "invalid_audio", "The audio could not be decoded: the file is damaged or uses an unsupported codec."
    )
