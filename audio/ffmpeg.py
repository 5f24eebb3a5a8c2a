"""FFmpeg (through PyAV) on a leash: blocks of float32 out of one open file, and nothing more.

It may open no other file or address, use only the demuxers the caller names and the audio decoders
listed here, and may not allocate without bound. Native layout comes out: FFmpeg's own stereo to mono is
3 dB louder than the mean. Yields what it decodes; the consumer counts, and stops by not asking.
"""

import ctypes
import logging
from collections.abc import Iterable, Iterator
from typing import IO, Any

import av
import av._core
import numpy as np
from numpy.typing import NDArray

from audio.errors import AudioDecodeError
from audio.limits import MIB

logger = logging.getLogger(__name__)

# What hostile bytes make PyAV, libsndfile's wrapper and numpy raise; MemoryError is a refused allocation.
CODEC_ERRORS = (
    av.FFmpegError,
    ValueError,
    TypeError,
    RuntimeError,
    ArithmeticError,
    LookupError,
    OSError,
    EOFError,
    MemoryError,
)

_MAX_ALLOCATION_BYTES = 32 * MIB  # of one FFmpeg buffer; ten minutes of any real index need 6 MiB
_BATCH_FRAMES = 16_384  # PCM frames to a block
_MAX_STREAMS = 8  # video, subtitles and cover art included

_DECODERS = (
    "aac,alac,amrnb,amrwb,libopencore_amrnb,libopencore_amrwb,flac,mp1,mp1float,mp2,mp2float,mp3,mp3float,"
    "opus,libopus,vorbis,libvorbis,speex,libspeex,wmav1,wmav2,wmapro,wmalossless,wmavoice,gsm,gsm_ms,g722,"
    "g726,g726le,adpcm_ms,adpcm_ima_wav,adpcm_ima_qt,pcm_alaw,pcm_mulaw,pcm_u8,pcm_s8,pcm_s16le,pcm_s16be,"
    "pcm_s24le,pcm_s24be,pcm_s32le,pcm_s32be,pcm_f32le,pcm_f32be,pcm_f64le,pcm_f64be"
)

_OPTIONS = {
    "protocol_whitelist": "",  # a playlist or session description may not reach files or sockets
    "codec_whitelist": _DECODERS,  # probing would open video decoders too
    "max_streams": str(_MAX_STREAMS),
    "probesize": "1000000",  # bytes
    "analyzeduration": "2000000",  # microseconds
}

# Full scale of FFmpeg's integer sample types; unsigned ones are offset by it as well.
_FULL_SCALE = {"u1": 128.0, "i2": 32768.0, "i4": 2147483648.0}


def read_blocks(file: IO[bytes], demuxers: str) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield (sample rate in Hz, float32 [num_frames, num_channels]) for the first audio stream.

    Raises AudioDecodeError for a file without usable audio, else one of CODEC_ERRORS.
    """
    options = _OPTIONS | {"format_whitelist": demuxers}
    with av.open(file, mode="r", options=options, metadata_errors="ignore") as container:
        stream = _first_audio_stream(container)
        for other in container.streams:
            if other.index != stream.index:
                other.discard = av.stream.Discard.all
        yield from _batched(container.decode(stream))


def _batched(frames: Iterable[av.AudioFrame]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Join frames of one rate and layout: they hold 20 ms each, and every block costs the consumer."""
    pending: list[NDArray[np.float32]] = []
    num_pending = rate = 0
    for frame in frames:
        block = _to_float(frame)
        is_same = frame.sample_rate == rate and bool(pending) and block.shape[1] == pending[0].shape[1]
        if pending and (not is_same or num_pending >= _BATCH_FRAMES):
            yield rate, np.concatenate(pending)
            pending, num_pending = [], 0
        rate = frame.sample_rate
        pending.append(block)
        num_pending += len(block)
    if pending:
        yield rate, np.concatenate(pending)


def _first_audio_stream(container: Any) -> Any:
    if not container.streams.audio:
        raise AudioDecodeError("unsupported_audio", "The file holds no audio track.")
    stream = container.streams.audio[0]
    context = stream.codec_context  # None for a codec FFmpeg has no name for
    if context is None or context.name not in _DECODERS.split(","):
        raise AudioDecodeError("unsupported_audio", "The audio track uses an unsupported codec.")
    context.thread_count = 1  # concurrency is the caller's: one clip, one thread
    return stream


def _to_float(frame: av.AudioFrame) -> NDArray[np.float32]:
    num_channels = frame.layout.nb_channels
    raw = frame.to_ndarray()  # [channels, frames] if planar, else [1, frames * channels]
    full_scale = _FULL_SCALE.get(raw.dtype.str[1:])
    samples = raw.astype(np.float32, copy=False)
    if full_scale is not None:
        offset = full_scale if raw.dtype.kind == "u" else 0.0
        samples = (samples - np.float32(offset)) / np.float32(full_scale)
    return samples.T if frame.format.is_planar else samples.reshape(-1, num_channels)


def _bound_allocations() -> None:
    """Cap each FFmpeg allocation, process-wide; PyAV offers no option for it.

    A one-kilobyte MP4 may claim 2^30 samples, and FFmpeg allocates 24 bytes of index for each of them
    before the first one is decoded.
    """
    try:
        # The extension module is linked to libavutil, so the name resolves through its handle.
        av_max_alloc = ctypes.CDLL(av._core.__file__).av_max_alloc
    except (OSError, AttributeError):
        logger.warning("cannot bound FFmpeg's allocations on this platform: hostile files may exhaust memory")
        return
    av_max_alloc.argtypes = [ctypes.c_size_t]
    av_max_alloc.restype = None
    av_max_alloc(_MAX_ALLOCATION_BYTES)


_bound_allocations()
