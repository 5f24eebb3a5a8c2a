"""Test signals and the files made of them. Needs no ffmpeg binary: libsndfile and PyAV both encode."""

import io
from typing import Any

import av
import numpy as np
import soundfile
from numpy.typing import NDArray

import audio.decode
from audio import AudioLimits, Pcm


def chirp(seconds: float, rate: int, channels: int = 1) -> NDArray[np.float32]:
    """[frames, channels]: a rising tone with a beat, different and partly correlated per channel."""
    t = np.arange(round(seconds * rate)) / rate
    tones = [
        0.3 * np.sin(2 * np.pi * (200 + 150 * c + 120 * t) * t) * (0.6 + 0.4 * np.sin(2 * np.pi * 1.3 * t))
        for c in range(channels)
    ]
    return np.stack(tones, axis=1).astype(np.float32)


def decode(data: bytes, limits: AudioLimits) -> Pcm:
    """As the decoders do it, but in this process."""
    return Pcm(audio.decode.decode(io.BytesIO(data), limits))


def written(samples: NDArray[Any], rate: int, format: str, subtype: str | None = None) -> bytes:
    """Encoded by libsndfile."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


def encoded(samples: NDArray[np.float32], rate: int, format: str, codec: str, *, has_video: bool = False) -> bytes:
    """Encoded by FFmpeg, with a few black frames of video when asked."""
    layout = "mono" if samples.shape[1] == 1 else "stereo"
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.layout = layout
        if codec == "wmav2":
            stream.bit_rate = 96_000  # it has no default that works
        if has_video:
            _mux_pictures(container)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def silent_film() -> bytes:
    """An MP4 with pictures and no sound."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        _mux_pictures(container)
    return file.getvalue()


def _mux_pictures(container: Any) -> None:
    video = container.add_stream("mpeg4", rate=10)
    video.width = video.height = 64
    video.pix_fmt = "yuv420p"
    for index in range(10):
        picture = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        picture.pts = index
        container.mux(video.encode(picture))
    container.mux(video.encode(None))
