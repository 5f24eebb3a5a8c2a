"""Any rate to 16 kHz, block by block, equal to `librosa.load(sr=16000)`.

librosa's default is soxr's HQ quality, and so is this: streaming in blocks gives the same samples as
one call over the whole signal. Qwen's published examples load audio that way, which makes it the
parity target. Expects mono: mixing first is cheaper and, the filter being linear, the same.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import soxr
from numpy.typing import NDArray

from audio.pcm import SAMPLE_RATE


@dataclass(slots=True)
class Stopwatch:
    """Adds up."""

    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens within."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began

    def take(self) -> float:
        """The seconds so far, of which none are left."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class StreamResampler:
    """16 kHz samples from mono blocks at `source_rate` Hz, as they come. Not reusable after `finish`."""

    def __init__(self, source_rate: int, watch: Stopwatch | None = None) -> None:
        """watch: counts the time that resampling takes."""
        self._watch = watch or Stopwatch()
        self._source_rate = source_rate
        self._num_source_samples = 0
        self._num_samples = 0
        self._soxr = (
            None
            if source_rate == SAMPLE_RATE
            else soxr.ResampleStream(source_rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
        )

    def push(self, mono: NDArray[np.float32]) -> NDArray[np.float32]:
        """Take the next block, float32 [num_samples]. -> what is certain by now, perhaps nothing."""
        self._num_source_samples += len(mono)
        if self._soxr is None:
            samples = mono
        else:
            with self._watch.running():
                samples = self._soxr.resample_chunk(mono)
        self._num_samples += len(samples)
        return samples

    def finish(self) -> NDArray[np.float32]:
        """The rest. Of all together there are exactly ceil(num_source_samples * 16000 / source_rate)."""
        length = -(-self._num_source_samples * SAMPLE_RATE // self._source_rate)
        rest = np.zeros(length - self._num_samples, np.float32)  # soxr alone is sometimes one short of librosa
        if self._soxr is not None:
            with self._watch.running():
                flushed = self._soxr.resample_chunk(np.zeros(0, np.float32), last=True)[: len(rest)]
            rest[: len(flushed)] = flushed
        return rest
