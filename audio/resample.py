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
    """16 kHz samples from mono blocks at `source_rate` Hz, as they come. Not reusable after `finish`."""

    def __init__(self, source_rate: int) -> None:
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
        samples = mono if self._soxr is None else self._soxr.resample_chunk(mono)
        self._num_samples += len(samples)
        return samples

    def finish(self) -> NDArray[np.float32]:
        """The rest. Of all together there are exactly ceil(num_source_samples * 16000 / source_rate)."""
        length = -(-self._num_source_samples * SAMPLE_RATE // self._source_rate)
        rest = np.zeros(length - self._num_samples, np.float32)  # soxr alone is sometimes one short of librosa
        if self._soxr is not None:
            flushed = self._soxr.resample_chunk(np.zeros(0, np.float32), last=True)[: len(rest)]
            rest[: len(flushed)] = flushed
        return rest
