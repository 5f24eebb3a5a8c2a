"""What rooms, microphones, phones and speakers do to a clip, and the log-mel frames of the result.

All of it works on a batch of equal-length rows [B, L] in torch: a random spectral response per row (equaliser,
band limits, a short synthetic reverberation), telephone rows at 8 kHz with mu-law, noise of random colour,
the babble of another row, gain.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

SAMPLE_RATE = 16_000


def mel_filters(num_mels: int = 128, n_fft: int = 400) -> Tensor:
    """Slaney's mel filter bank [n_fft/2 + 1, num_mels], 0 to 8 kHz."""

    def to_hertz(mel: np.ndarray) -> np.ndarray:
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * math.log(6.4) / 27))

    top = 15 + 27 * math.log(8000 / 1000) / math.log(6.4)
    points = to_hertz(np.linspace(0, top, num_mels + 2))
    bins = np.linspace(0, SAMPLE_RATE / 2, n_fft // 2 + 1)[:, None]
    rise = (bins - points[:-2]) / np.diff(points)[:-1]
    fall = (points[2:] - bins) / np.diff(points)[1:]
    bank = np.maximum(0, np.minimum(rise, fall)) * 2 / (points[2:] - points[:-2])
    return torch.from_numpy(bank.astype(np.float32))


_FILTERS = mel_filters()
_WINDOW = torch.hann_window(400)


def log_mel(pcm: Tensor) -> Tensor:
    """[B, L] samples -> [B, 128, F + 2], whose first F = ceil(L/160) frames hold the clip.

    The two frames after them are what the encoder's convolutions see past its end (clips under 29.98 s).
    """
    num_frames = -(-pcm.shape[1] // 160)
    padded = torch.nn.functional.pad(pcm, (0, 160 * (num_frames + 1) + 200 - pcm.shape[1]))
    padded = torch.cat([padded[:, 1:201].flip(1), padded], dim=1)
    spectrum = torch.stft(padded, 400, 160, window=_WINDOW, center=False, return_complex=True)
    power = spectrum.real**2 + spectrum.imag**2  # [B, 201, F + 2]
    mel = (power.transpose(1, 2) @ _FILTERS).clamp(min=1e-10).log10()
    mel = torch.maximum(mel, mel.amax(dim=(1, 2), keepdim=True) - 8)
    return (mel.transpose(1, 2) + 4) / 4


def augment(pcm: Tensor, keep_level: Tensor, rng: np.random.Generator) -> Tensor:
    """Augment speech and sounds [B, L]. Rows with `keep_level` (silence) are left as they are."""
    wet = _shape_spectrum(pcm, rng)
    wet = _add_noise(wet, rng)
    phone = torch.from_numpy(rng.random(len(pcm)) < 0.22)
    if phone.any():
        wet[phone] = telephone(wet[phone], rng)
    peak = wet.abs().amax(dim=1, keepdim=True).clamp(min=1e-5)
    gain = torch.from_numpy(10 ** rng.uniform(-1.5, 0.05, (len(pcm), 1))).float()
    wet = (wet * (gain / peak)).clamp(-1, 1)
    coarse = torch.from_numpy(rng.random(len(pcm)) < 0.5)
    wet[coarse] = (wet[coarse] * 32767).round() / 32767
    return torch.where(keep_level[:, None], pcm, wet)


def telephone(pcm: Tensor, rng: np.random.Generator | None = None) -> Tensor:
    """The 8 kHz telephone band: 300-3400 Hz, decimated, mu-law in most rows, interpolated back."""
    rows, length = pcm.shape
    padded = length + (-length) % 4
    spectrum = torch.fft.rfft(pcm, n=padded)
    hertz = torch.linspace(0, SAMPLE_RATE / 2, spectrum.shape[1])
    low = torch.full((rows, 1), 300.0)
    high = torch.full((rows, 1), 3400.0)
    if rng is not None:
        low = torch.from_numpy(rng.uniform(0, 350, (rows, 1))).float()
        high = torch.from_numpy(rng.uniform(3000, 4000, (rows, 1))).float()
    response = torch.sigmoid((hertz - low) / 30) * torch.sigmoid((high - hertz) / 40)
    half = padded // 4 + 1  # bins up to 4 kHz
    narrow = torch.fft.irfft((spectrum * response)[:, :half], n=padded // 2)  # at 8 kHz, half the level
    narrow = narrow / narrow.abs().amax(dim=1, keepdim=True).clamp(min=1e-5)
    level = 0.5 if rng is None else torch.from_numpy(10 ** rng.uniform(-1.2, -0.02, (rows, 1))).float()
    narrow = mu_law(narrow * level)
    back = torch.fft.rfft(narrow)
    return torch.fft.irfft(torch.nn.functional.pad(back, (0, spectrum.shape[1] - half)), n=padded)[:, :length]


def mu_law(pcm: Tensor) -> Tensor:
    """Round to the 8-bit mu-law scale and back."""
    squeezed = pcm.sign() * torch.log1p(255 * pcm.abs()) / math.log(256)
    squeezed = (squeezed * 127).round() / 127
    return squeezed.sign() * (torch.expm1(squeezed.abs() * math.log(256)) / 255)


def _shape_spectrum(pcm: Tensor, rng: np.random.Generator) -> Tensor:
    rows, length = pcm.shape
    size = 1 << (length + 3200 - 1).bit_length()
    size = min(size, -(-(length + 3200) // 1280) * 1280)
    hertz = torch.linspace(0, SAMPLE_RATE / 2, size // 2 + 1)
    response = 10 ** (_random_curves(rng, rows, size // 2 + 1, 9.0) / 20)
    low = torch.from_numpy(np.where(rng.random(rows) < 0.3, rng.uniform(60, 350, rows), -500)).float()[:, None]
    high = np.where(rng.random(rows) < 0.25, rng.uniform(3200, 7500, rows), 12_000)
    high = torch.from_numpy(high).float()[:, None]
    response = response * torch.sigmoid((hertz - low) / 40) * torch.sigmoid((high - hertz) / 120)
    spectrum = torch.fft.rfft(pcm, n=size) * response
    room = torch.from_numpy(rng.random(rows) < 0.45)
    if room.any():
        spectrum[room] = spectrum[room] * torch.fft.rfft(_rooms(rng, int(room.sum())), n=size)
    return torch.fft.irfft(spectrum, n=size)[:, :length]


def _random_curves(rng: np.random.Generator, rows: int, bins: int, decibels: float) -> Tensor:
    """Smooth random responses [rows, bins] in dB."""
    knots = torch.from_numpy(rng.normal(0, decibels / 2, (rows, 1, 9))).float()
    scale = torch.from_numpy((rng.random((rows, 1)) < 0.7).astype(np.float32))
    return torch.nn.functional.interpolate(knots, size=bins, mode="linear", align_corners=True)[:, 0] * scale


def _rooms(rng: np.random.Generator, rows: int) -> Tensor:
    """Impulse responses of up to 0.2 s: the direct sound and an exponential tail of noise."""
    time = torch.arange(3200) / SAMPLE_RATE
    decay = torch.from_numpy(rng.uniform(0.01, 0.09, (rows, 1))).float()
    level = torch.from_numpy(10 ** rng.uniform(-2.5, -1.35, (rows, 1))).float()
    tail = torch.from_numpy(rng.standard_normal((rows, 3200)).astype(np.float32)) * torch.exp(-time / decay)
    tail = tail * level * (time > 0.002)
    tail[:, 0] = 1.0
    return tail


def _add_noise(pcm: Tensor, rng: np.random.Generator) -> Tensor:
    """Coloured noise at 9 to 50 dB below the clip in most rows, and some rows faintly over others."""
    rows, length = pcm.shape
    loudness = pcm.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-5)
    noise = torch.from_numpy(rng.standard_normal((rows, length), dtype=np.float32))
    colour = torch.from_numpy(rng.uniform(-0.6, 0.95, (rows, 1))).float()
    noise = noise + colour * noise.roll(1, dims=1) + colour.clamp(min=0) ** 2 * noise.roll(2, dims=1)
    noise = noise / noise.square().mean(dim=1, keepdim=True).sqrt()
    ratio = torch.from_numpy(10 ** (-rng.uniform(9, 50, (rows, 1)) / 20)).float()
    use = torch.from_numpy((rng.random((rows, 1)) < 0.7).astype(np.float32))
    babble = pcm.roll(1, dims=0).roll(length // 3, dims=1) + pcm.roll(2, dims=0).roll(length // 2, dims=1)
    babble = babble / babble.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-5)
    faint = torch.from_numpy(10 ** (-rng.uniform(14, 35, (rows, 1)) / 20) * (rng.random((rows, 1)) < 0.25))
    return pcm + loudness * (noise * ratio * use + babble * faint.float())
