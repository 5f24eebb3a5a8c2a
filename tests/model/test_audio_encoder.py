"""The encoder at true length: against its own padded mode, against transformers, and clips against each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from model.attention import select_backend
from model.config import Qwen2AudioConfig, num_audio_tokens
from model.loader import load_model
from model.qwen2_audio import Qwen2Audio
from tests.reference import Reference, noise

FRAMES = [3, 4, 5, 6, 160, 161, 162, 163, 730, 731, 2997, 2998, 2999, 3000]
LENGTHS = [160 * frames - cut for frames in FRAMES for cut in (0, 7)] + [321, 479_521]


@pytest.fixture(scope="module")
def model(gqa_folder: Path) -> Qwen2Audio:
    """Ours, in float32."""
    backend, _ = select_backend("reference", torch.device("cpu"))
    config = Qwen2AudioConfig.from_folder(gqa_folder)
    return load_model(gqa_folder, config, backend, torch.float32, torch.device("cpu"))


def loud_tail(num_samples: int) -> np.ndarray:
    """Sound up to the last sample: what a wrong right edge would get wrong."""
    samples = noise(num_samples, seed=num_samples)
    samples[-200:] += 0.3
    return samples


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.inference_mode()
@pytest.mark.parametrize("num_samples", LENGTHS)
def test_true_length_equals_the_padded_window(model: Qwen2Audio, num_samples: int) -> None:
    clip = loud_tail(num_samples)
    padded = model.projector(model.audio_tower.forward_padded(torch.from_numpy(clip)))
    (ours,) = model.encode_audio([clip])
    assert ours.shape == padded.shape == (num_audio_tokens(num_samples), 128)
    assert relative_error(ours, padded) < 1e-5


@pytest.mark.parametrize("num_samples", [321, 960, 961, 161 * 160, 116_800, 2998 * 160 - 7, 480_000])
def test_equals_transformers(model: Qwen2Audio, gqa_reference: Reference, num_samples: int) -> None:
    samples = loud_tail(num_samples)
    with torch.inference_mode():
        (ours,) = model.encode_audio([samples])
    torch.testing.assert_close(ours, gqa_reference.encode(samples), atol=2e-5, rtol=1e-5)


@torch.inference_mode()
def test_clips_packed_together_come_out_as_alone(model: Qwen2Audio) -> None:
    lengths = [480_000, 321, 161 * 160, 160 * 160, 5000, 479_521, 961, 2999 * 160]
    clips = [loud_tail(length) for length in lengths]
    packed = model.encode_audio(clips)
    for clip, rows in zip(clips, packed, strict=True):
        (alone,) = model.encode_audio([clip])
        assert relative_error(rows, alone) < 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_clip_of_broken_samples_spoils_no_neighbour(model: Qwen2Audio, poison: float) -> None:
    good = [loud_tail(length) for length in (8000, 9001)]
    bad = np.full(4800, poison, dtype=np.float32)
    first, broken, second = model.encode_audio([good[0], bad, good[1]])
    assert not broken.isfinite().all()
    for rows, clip in ((first, good[0]), (second, good[1])):
        (alone,) = model.encode_audio([clip])
        assert relative_error(rows, alone) < 1e-5


@torch.inference_mode()
def test_silence_is_finite(model: Qwen2Audio, gqa_reference: Reference) -> None:
    (ours,) = model.encode_audio([np.zeros(16_000, dtype=np.float32)])
    torch.testing.assert_close(ours, gqa_reference.encode(np.zeros(16_000, np.float32)), atol=2e-5, rtol=1e-5)
