"""Waveform -> log-mel spectrogram, as Whisper's feature extractor computes it, at the clip's true length.

The reference pads every clip to 30 s before it looks. Nothing past the clip changes the frames that hold audio
except through the window's overlap, so a clip is padded by just the samples that its own frames can see; what
comes out equals the first frames of the reference bit for bit (transformers' feature_extraction_whisper.py).

    F = ceil(samples / 160)      frames that hold audio
    C = ceil(F / 2)              frames behind the encoder's stride-2 convolution
    K = min(2 C + 1, 3000)       frames that the convolutions must see to compute those C

Frames F and F + 1 are not padding: they still see up to 200 and 40 samples of the clip's tail.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import (
    HOP_LENGTH,
    MAX_AUDIO_SAMPLES,
    MAX_MEL_FRAMES,
    SAMPLE_RATE,
    num_conv_frames,
    num_mel_frames,
)

N_FFT = 400
"""Samples in one window: 25 ms."""
NUM_BINS = N_FFT // 2 + 1
DYNAMIC_RANGE = 8.0
"""log10 units below the clip's maximum at which the spectrum is clamped."""


def num_input_frames(num_samples: int) -> int:
    """K: mel frames that the convolutions must see for a clip of `num_samples`."""
    return min(2 * num_conv_frames(num_mel_frames(num_samples)) + 1, MAX_MEL_FRAMES)


def log_mel(samples: Tensor, num_mel_bins: int) -> Tensor:
    """Spectrogram of one clip. samples: float32 [S] at 16 kHz, 1 <= S <= 480,000 -> float32 [num_mel_bins, K]."""
    num_samples = samples.shape[0]
    assert 0 < num_samples <= MAX_AUDIO_SAMPLES, "the clip's length is checked before it gets here"
    frames = num_mel_frames(num_samples)
    half = N_FFT // 2
    if frames + 2 > MAX_MEL_FRAMES - 1:
        # Frame 2999 reaches past sample 480,000, where the reference reflects: only here must we do so too.
        padded = F.pad(samples, (0, MAX_AUDIO_SAMPLES - num_samples))
        padded = F.pad(padded[None], (half, half), mode="reflect")[0]
        frames_seen = MAX_MEL_FRAMES
    else:
        # Zeros up to the end of frame F + 1, the last that can see audio.
        padded = F.pad(samples, (0, HOP_LENGTH * (frames + 1) + half - num_samples))
        padded = F.pad(padded[None], (half, 0), mode="reflect")[0]
        frames_seen = frames + 2
    spectrum = _power_spectrum(padded)[:, :frames_seen]
    return _log_compress(_mel_filters(num_mel_bins, samples.device).T @ spectrum)[:, : num_input_frames(num_samples)]


def log_mel_padded(samples: Tensor, num_mel_bins: int) -> Tensor:
    """The reference's own way, for tests: pad to 30 s first. samples: [S] -> [num_mel_bins, 3000]."""
    half = N_FFT // 2
    padded = F.pad(samples, (0, MAX_AUDIO_SAMPLES - samples.shape[0]))
    padded = F.pad(padded[None], (half, half), mode="reflect")[0]
    spectrum = _power_spectrum(padded)[:, :MAX_MEL_FRAMES]
    return _log_compress(_mel_filters(num_mel_bins, samples.device).T @ spectrum)


def _power_spectrum(padded: Tensor) -> Tensor:
    """padded: [S] -> [NUM_BINS, frames]."""
    window = torch.hann_window(N_FFT, device=padded.device)
    spectrum = torch.stft(padded, N_FFT, HOP_LENGTH, window=window, center=False, return_complex=True)
    return spectrum.abs().square()


def _log_compress(mel: Tensor) -> Tensor:
    """Logarithm, clamp to the clip's own dynamic range, scale. mel: [bins, frames] -> same shape."""
    log = mel.clamp(min=1e-10).log10()
    log = torch.maximum(log, log.max() - DYNAMIC_RANGE)
    return (log + 4.0) / 4.0


@lru_cache(maxsize=8)
def _mel_filters(num_mel_bins: int, device: torch.device) -> Tensor:
    """Slaney-scale, Slaney-normalised triangles from 0 to 8 kHz. -> float32 [NUM_BINS, num_mel_bins].

    Computed in float64 and cast once; equal to transformers' `mel_filter_bank` bit for bit.
    """
    edges = _mel_to_hertz(torch.linspace(0.0, _hertz_to_mel(SAMPLE_RATE / 2), num_mel_bins + 2, dtype=torch.float64))
    bins = torch.linspace(0.0, SAMPLE_RATE / 2, NUM_BINS, dtype=torch.float64)
    rising = (bins[:, None] - edges[None, :-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[None, 2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    triangles = torch.minimum(rising, falling).clamp(min=0.0)
    return (triangles * (2.0 / (edges[2:] - edges[:-2]))).float().to(device)


_BREAK_HERTZ, _BREAK_MEL = 1000.0, 15.0
_LOG_STEP = 27.0 / float(torch.log(torch.tensor(6.4, dtype=torch.float64)))


def _hertz_to_mel(hertz: float) -> float:
    """Slaney's scale above its 1 kHz break (all we need: the upper edge)."""
    return _BREAK_MEL + _LOG_STEP * float(torch.log(torch.tensor(hertz / _BREAK_HERTZ, dtype=torch.float64)))


def _mel_to_hertz(mel: Tensor) -> Tensor:
    """Slaney's scale: linear below 1 kHz, logarithmic above."""
    return torch.where(mel < _BREAK_MEL, mel * 200.0 / 3.0, _BREAK_HERTZ * torch.exp((mel - _BREAK_MEL) / _LOG_STEP))
