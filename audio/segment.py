"""Long sound cut into windows at quiet points, while it streams by.

Windows are consecutive: put end to end they are the sound, sample for sample. Each is at most as long as
asked for, and none but an only one is shorter than `MIN_WINDOW_SAMPLES`. A cut is the middle of the quietest
tenth of a second near the window's end, the latest where several are about as quiet. Where the cuts fall
depends on the samples alone, not on the blocks they come in. At most one window and the block at hand are
held. Knows nothing of models.
"""

from collections.abc import Generator, Iterable

import numpy as np
from numpy.typing import NDArray

from audio.pcm import SAMPLE_RATE

MIN_WINDOW_SAMPLES = SAMPLE_RATE // 10
SEARCH_SAMPLES = 5 * SAMPLE_RATE
"""How far before the window's end a cut may fall; half the window where that is less."""

_HOP = SAMPLE_RATE // 100
_QUIET_HOPS = 10
_QUIET_SAMPLES = _QUIET_HOPS * _HOP
_AS_QUIET = 1.1
"""Energies within this factor of the lowest count as equal."""

Samples = NDArray[np.float32]


class Segmenter:
    """Cuts one stream of samples. Not reusable after `finish`."""

    def __init__(self, max_samples: int) -> None:
        """max_samples: of a window; at least a second, so that there is room to look for a pause."""
        if max_samples < SAMPLE_RATE:
            raise ValueError(f"a window must have at least {SAMPLE_RATE} samples")
        self._max_samples = max_samples
        self._pending = np.zeros(0, np.float32)

    def push(self, block: Samples) -> list[Samples]:
        """Take the next samples, float32 [S]. -> the windows that are now certain."""
        self._pending = np.concatenate((self._pending, block))
        windows = []
        while len(self._pending) >= self._max_samples + MIN_WINDOW_SAMPLES:
            windows.append(self._cut(self._max_samples))
        return windows

    def finish(self) -> list[Samples]:
        """What is left: at most two windows, none when there never was a sample."""
        windows = []
        if len(self._pending) > self._max_samples:
            windows.append(self._cut(len(self._pending) - MIN_WINDOW_SAMPLES))
        if len(self._pending):
            windows.append(self._pending)
        self._pending = np.zeros(0, np.float32)
        return windows

    def _cut(self, latest: int) -> Samples:
        earliest = self._max_samples - min(SEARCH_SAMPLES, self._max_samples // 2)
        cut = quietest_point(self._pending, earliest, latest)
        window, self._pending = self._pending[:cut].copy(), self._pending[cut:]
        return window


def segment(blocks: Iterable[Samples], max_samples: int) -> Generator[Samples, None, None]:
    """The windows of a stream, each float32 [S] with S <= max_samples, as soon as they are certain."""
    segmenter = Segmenter(max_samples)
    for block in blocks:
        yield from segmenter.push(block)
    yield from segmenter.finish()


def quietest_point(samples: Samples, earliest: int, latest: int) -> int:
    """Where to cut, from `earliest` to `latest`; both are at least 50 ms away from the ends of `samples`."""
    start = earliest - _QUIET_SAMPLES // 2
    num_hops = (latest - earliest + _QUIET_SAMPLES) // _HOP
    hops = samples[start : start + num_hops * _HOP].reshape(num_hops, _HOP)
    energies = np.square(hops, dtype=np.float64).sum(axis=1)  # summed by hop: exact zeros for silence
    levels = np.lib.stride_tricks.sliding_window_view(energies, _QUIET_HOPS).sum(axis=1)
    latest_quiet = int(np.flatnonzero(levels <= _AS_QUIET * levels.min())[-1])
    return earliest + latest_quiet * _HOP
