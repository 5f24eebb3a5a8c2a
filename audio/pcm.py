"""The one form of sound that leaves this package: mono, 16 kHz, float32.

Invariants: one dimension, contiguous, at least one sample, read-only; `content_hash` is a function
of the samples alone, so equal sound has equal identity whatever file or link it came in. Caches key
on it. Knows nothing of frames, mel bins or tokens.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE = 16_000  # Hz; the rate of Whisper's, hence Qwen2-Audio's, feature extractor


@dataclass(frozen=True, slots=True)
class Pcm:
    """A clip as the model hears it. Two clips are equal when their samples are, bit for bit.

    `samples` are float32 [num_samples], nominally in -1..1. A writable array is copied. `content_hash`
    is the hex SHA-256 of the samples' bytes. Raises ValueError for any other shape or type.
    """

    samples: NDArray[np.float32] = field(repr=False, compare=False)
    content_hash: str = field(init=False)

    def __post_init__(self) -> None:
        samples = self.samples
        if samples.dtype != np.float32 or samples.ndim != 1 or not len(samples):
            raise ValueError("PCM must be a non-empty one-dimensional float32 array")
        if samples.flags.writeable or not samples.flags.c_contiguous:
            samples = samples.copy()
            samples.setflags(write=False)
        object.__setattr__(self, "samples", samples)
        object.__setattr__(self, "content_hash", hashlib.sha256(samples.data).hexdigest())

    @property
    def num_samples(self) -> int:
        return len(self.samples)

    @property
    def duration_s(self) -> float:
        return len(self.samples) / SAMPLE_RATE
