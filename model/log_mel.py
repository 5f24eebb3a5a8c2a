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


CPU_FRAMES = 1024
"""Transformed at once on a CPU: so many stay in a core's cache."""


def num_input_frames(num_samples: int) -> int:
    """K: mel frames that the convolutions must see for a clip of `num_samples`."""
    return min(2 * num_conv_frames(num_mel_frames(num_samples)) + 1, MAX_MEL_FRAMES)


def log_mel(
    signal: Tensor, frame_of_column: Tensor, clip_of_column: Tensor, num_clips: int, num_mel_bins: int
) -> Tensor:
    """Spectrogram of several clips at once, each clamped to its own dynamic range.

    signal: float32, of all clips (clip_pack lays it out); of each column, int32 [S]: the hop at which its frame
    begins, and its clip. -> float32 [num_mel_bins, S].
    """
    device = signal.device
    frames = signal.unfold(0, N_FFT, HOP_LENGTH)
    filters = _mel_filters(num_mel_bins, device).T
    parts = []
    for places in torch.split(frame_of_column, CPU_FRAMES if device.type == "cpu" else len(frame_of_column)):
        spectrum = torch.fft.rfft(frames.index_select(0, places).mul_(_window(device))).abs().square()
        parts.append(filters @ spectrum.T)
    log = torch.cat(parts, dim=1).clamp_(min=1e-10).log10_()
    loudest = log.new_full((num_clips,), -torch.inf)
    loudest = loudest.scatter_reduce(0, clip_of_column.long(), log.amax(0), "amax")
    floor = (loudest - DYNAMIC_RANGE).index_select(0, clip_of_column)
    return torch.maximum(log, floor).add_(4.0).div_(4.0)


def log_mel_padded(samples: Tensor, num_mel_bins: int) -> Tensor:
    """The reference's own way, for tests: pad to 30 s first. samples: [S] -> [num_mel_bins, 3000]."""
    half = N_FFT // 2
    padded = F.pad(samples, (0, MAX_AUDIO_SAMPLES - samples.shape[0]))
    padded = F.pad(padded[None], (half, half), mode="reflect")[0]
    spectrum = _power_spectrum(padded)[:, :MAX_MEL_FRAMES]
    return _log_compress(_mel_filters(num_mel_bins, samples.device).T @ spectrum)


def _power_spectrum(padded: Tensor) -> Tensor:
    """padded: [S] -> [NUM_BINS, frames]."""
    window = _window(padded.device)
    spectrum = torch.stft(padded, N_FFT, HOP_LENGTH, window=window, center=False, return_complex=True)
    return spectrum.abs().square()


def _log_compress(mel: Tensor) -> Tensor:
    """Logarithm, clamp to the clip's own dynamic range, scale. mel: [bins, frames] -> same shape."""
    log = mel.clamp(min=1e-10).log10()
    log = torch.maximum(log, log.max() - DYNAMIC_RANGE)
    return (log + 4.0) / 4.0


@lru_cache(maxsize=8)
def _window(device: torch.device) -> Tensor:
    """float32 [N_FFT]"""
    return torch.hann_window(N_FFT, device=device)


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
