"""Log-mel at true length against transformers' feature extractor, which pads to 30 s first."""

from __future__ import annotations

from itertools import cycle

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from model.clip_pack import pack_clips
from model.config import num_mel_frames
from model.log_mel import _mel_filters, log_mel_padded, num_input_frames
from model.log_mel import log_mel as log_mel_of_pack
from tests.reference import noise

LENGTHS = [1, 159, 160, 161, 320, 321, 400, 479, 480, 481, 960, 961, 4800]
LENGTHS += [160 * 160, 161 * 160 - 5, 161 * 160, 162 * 160 - 159, 116_800, 116_801]
LENGTHS += [160 * frames - cut for frames in (2997, 2998, 2999, 3000) for cut in (0, 1, 7, 80, 159)]
LENGTHS += [479_520, 479_521]

EXTRACTOR = WhisperFeatureExtractor(feature_size=128)


def log_mels(clips: list[torch.Tensor], num_mel_bins: int) -> list[torch.Tensor]:
    """All clips at once. -> the real columns of each, [num_mel_bins, K]."""
    pack = pack_clips([clip.numpy() for clip in clips], torch.device("cpu"))
    columns = log_mel_of_pack(pack.signal, pack.frame_of_column, pack.clip_of_column, len(clips), num_mel_bins)
    is_real = pack.is_blank == 0
    return [columns[:, is_real & (pack.clip_of_column == clip)] for clip in range(len(clips))]


def log_mel(samples: torch.Tensor, num_mel_bins: int) -> torch.Tensor:
    (columns,) = log_mels([samples], num_mel_bins)
    return columns


def reference(samples: np.ndarray, num_mel_bins: int = 128) -> torch.Tensor:
    """-> [num_mel_bins, 3000]."""
    extractor = EXTRACTOR if num_mel_bins == 128 else WhisperFeatureExtractor(feature_size=num_mel_bins)
    return extractor(samples, sampling_rate=16000, return_tensors="pt")["input_features"][0]


@pytest.mark.parametrize("num_samples", LENGTHS)
def test_frames_equal_the_reference(num_samples: int) -> None:
    samples = noise(num_samples)
    samples[-200:] += 0.3  # a loud tail: frames F and F + 1 are not mere padding
    ours = log_mel(torch.from_numpy(samples), 128)
    theirs = reference(samples)[:, : ours.shape[1]]
    assert ours.shape == (128, num_input_frames(num_samples))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_samples", [321, 16_001, 479_900, 480_000])
def test_padded_mode_equals_the_reference_over_the_whole_window(num_samples: int) -> None:
    samples = noise(num_samples)
    torch.testing.assert_close(log_mel_padded(torch.from_numpy(samples), 128), reference(samples), atol=1e-4, rtol=0)


def test_the_two_modes_agree_at_every_length_near_a_frame_edge() -> None:
    for num_samples in range(5 * 160 - 3, 7 * 160 + 3, 7):
        samples = torch.from_numpy(noise(num_samples, seed=num_samples))
        ours = log_mel(samples, 128)
        torch.testing.assert_close(ours, log_mel_padded(samples, 128)[:, : ours.shape[1]], atol=1e-5, rtol=0)


def test_the_convolutions_get_one_frame_past_an_even_count_and_two_past_an_odd_one() -> None:
    for frames in range(1, 2999):
        assert num_input_frames(160 * frames) == frames + (2 if frames % 2 else 1)
    assert [num_input_frames(160 * frames) for frames in (2998, 2999, 3000)] == [2999, 3000, 3000]


def test_clips_that_are_packed_together_are_what_they_are_alone() -> None:
    """The very same numbers, loud and quiet ones side by side, whatever their order; NaN stays in its clip."""
    clips = [
        torch.from_numpy(noise(n, seed=n)) * gain for n, gain in zip(LENGTHS, cycle([1.0, 30.0, 1e-4]), strict=False)
    ]
    clips[7][3] = float("nan")
    for order in (list(range(len(clips))), list(range(len(clips)))[::-1]):
        for k, together in zip(order, log_mels([clips[k] for k in order], 128), strict=True):
            alone = log_mel(clips[k], 128)
            torch.testing.assert_close(together, alone, atol=1e-6, rtol=0, equal_nan=True)
            assert bool(together.isnan().any()) == (k == 7)


def test_silence_is_flat() -> None:
    ours = log_mel(torch.zeros(16_000), 128)
    torch.testing.assert_close(ours, torch.full_like(ours, -1.5))
    torch.testing.assert_close(ours, reference(np.zeros(16_000, np.float32))[:, : ours.shape[1]])


def test_the_clamp_follows_each_clips_own_maximum() -> None:
    samples = noise(8000)
    samples[4000:] = 0.0
    for gain in (1e-4, 1.0, 30.0):
        ours = log_mel(torch.from_numpy(samples * np.float32(gain)), 128)
        torch.testing.assert_close(
            ours, reference(samples * np.float32(gain))[:, : ours.shape[1]], atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("num_mel_bins", [80, 128])
def test_filter_bank_equals_the_references(num_mel_bins: int) -> None:
    theirs = mel_filter_bank(201, num_mel_bins, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    ours = _mel_filters(num_mel_bins, torch.device("cpu"))
    assert np.array_equal(ours.numpy(), theirs.astype(np.float32))


def test_frames_that_hold_audio_are_those_of_the_references_mask() -> None:
    for num_samples in (1, 160, 161, 321, 4799, 4801, 479_999, 480_000):
        mask = EXTRACTOR(noise(num_samples), sampling_rate=16000, return_attention_mask=True, padding="max_length")[
            "attention_mask"
        ]
        assert num_mel_frames(num_samples) == int(np.asarray(mask).sum())
