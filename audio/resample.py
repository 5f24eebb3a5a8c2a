"""Any rate to 16 kHz, block by block, equal to `librosa.load(sr=16000)`.

librosa's default is soxr's HQ quality, and so is this: streaming in blocks gives the same samples as
one call over the whole signal. Qwen's published examples load audio that way, which makes it the
parity target. Expects mono: mixing first is cheaper and, the filter being linear, the same.
"""

import numpy as np
import soxr
from numpy.typing import NDArray

from audio.pcm import SAMPLE_RATE


class StreamResampler:
    """Collects 16 kHz samples from mono blocks at `source_rate` Hz. Not reusable after `finish`."""

    def __init__(self, source_rate: int) -> None:
        self._source_rate = source_rate
        self._num_source_samples = 0
        self._blocks: list[NDArray[np.float32]] = []
        self._soxr = (
            None
            if source_rate == SAMPLE_RATE
            else soxr.ResampleStream(source_rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
        )

    def push(self, mono: NDArray[np.float32]) -> None:
        """Take the next block, float32 [num_samples]. The array is not written to, but may be kept."""
        self._num_source_samples += len(mono)
        self._blocks.append(mono if self._soxr is None else self._soxr.resample_chunk(mono))

    def finish(self) -> NDArray[np.float32]:
        """All of it, read-only: exactly ceil(num_source_samples * 16000 / source_rate) samples."""
        if self._soxr is not None:
            self._blocks.append(self._soxr.resample_chunk(np.zeros(0, np.float32), last=True))
        length = -(-self._num_source_samples * SAMPLE_RATE // self._source_rate)
        samples = np.zeros(length, np.float32)  # soxr alone is sometimes one sample short of librosa
        start = 0
        for block in self._blocks:
            kept = block[: length - start]
            samples[start : start + len(kept)] = kept
            start += len(kept)
        self._blocks.clear()
        samples.setflags(write=False)
        return samples
