"""Windows of long sound: nothing lost, nothing doubled, cut where it is quiet, however the blocks fall."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio import SAMPLE_RATE, AudioError, AudioLimits, segment
from audio.decode import decode_blocks
from audio.segment import MIN_WINDOW_SAMPLES, Segmenter
from tests.audio.signals import chirp, decode, encoded, written

LIMITS = AudioLimits()
WINDOW = 2 * SAMPLE_RATE


def numbered(num_samples):
    """No two samples alike, so that a lost or doubled one shows."""
    return np.arange(num_samples, dtype=np.float32)


def in_blocks(samples, sizes):
    start = 0
    for size in sizes:
        yield samples[start : start + size]
        start += size
    yield samples[start:]


@settings(max_examples=60, deadline=None)
@given(
    num_samples=st.one_of(st.integers(1, 10 * WINDOW), st.sampled_from(
        [WINDOW * k + d for k in (1, 2) for d in (-1, 0, 1, 320, 321, MIN_WINDOW_SAMPLES - 1, MIN_WINDOW_SAMPLES)]
    )),
    sizes=st.lists(st.integers(1, 3 * WINDOW), max_size=8),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_windows_are_the_sound_and_do_not_depend_on_the_blocks(num_samples, sizes, seed):
    loudness = np.random.default_rng(seed).random(num_samples // 800 + 1).repeat(800)[:num_samples]
    sound = ((numbered(num_samples) + 1) * np.where(loudness < 0.3, 0, loudness)).astype(np.float32)
    windows = list(segment(in_blocks(sound, sizes), WINDOW))
    assert np.array_equal(np.concatenate(windows), sound)
    assert all(len(window) <= WINDOW for window in windows)
    assert len(windows) == 1 or all(len(window) >= MIN_WINDOW_SAMPLES for window in windows)
    whole = list(segment([sound], WINDOW))
    assert [len(window) for window in windows] == [len(window) for window in whole]


def test_nothing_gives_nothing():
    assert list(segment([], WINDOW)) == []


def test_cuts_fall_into_the_pause():
    sound = np.random.default_rng(0).normal(0, 0.2, 31 * SAMPLE_RATE).astype(np.float32)
    pause = slice(27 * SAMPLE_RATE, 27 * SAMPLE_RATE + 8_000)
    sound[pause] *= 0.01
    first, second = segment([sound], 30 * SAMPLE_RATE)
    assert pause.start + 800 <= len(first) <= pause.stop - 800
    assert len(first) + len(second) == len(sound)


def test_silence_is_cut_as_late_as_may_be():
    assert [len(window) for window in segment([np.zeros(5 * WINDOW + 3_000, np.float32)], WINDOW)] == [
        *[WINDOW] * 5,
        3_000,
    ]


def test_only_a_window_is_held():
    segmenter = Segmenter(WINDOW)
    for _ in range(50):
        segmenter.push(np.ones(WINDOW // 3, np.float32))
        assert len(segmenter._pending) < WINDOW + MIN_WINDOW_SAMPLES


def test_a_window_needs_room_for_a_pause():
    with pytest.raises(ValueError, match="at least"):
        Segmenter(SAMPLE_RATE - 1)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_blocks_of_a_file_are_the_file(rate):
    sound = chirp(9.1373, rate, channels=2)
    for data in (written(sound, rate, "WAV", "PCM_16"), encoded(sound, 48_000, "webm", "libopus")):
        blocks = list(decode_blocks(io.BytesIO(data), LIMITS))
        assert np.array_equal(np.concatenate(blocks), decode(data, LIMITS).samples)
        assert len(blocks) > 1


def test_file_that_only_ffmpeg_reads_streams_too():
    flac = bytearray(written(chirp(1.0, SAMPLE_RATE), SAMPLE_RATE, "FLAC"))
    flac[21] &= 0xF0  # an unknown number of samples
    flac[22:26] = bytes(4)
    assert sum(map(len, decode_blocks(io.BytesIO(flac), LIMITS))) == SAMPLE_RATE


@pytest.mark.parametrize(("data", "code"), [(b"", "audio_empty"), (b"<html>", "unsupported_audio")])
def test_what_is_no_audio_is_told(data, code):
    with pytest.raises(AudioError) as caught:
        list(decode_blocks(io.BytesIO(data), LIMITS))
    assert caught.value.code == code
