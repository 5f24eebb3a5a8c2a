"""Sounds that are not speech, drawn from formulas: tones, noise, sirens, clicks, bells and silence."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SAMPLE_RATE = 16_000


def tone(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """A steady sine, now and then with one weak overtone."""
    time = np.arange(num_samples) / SAMPLE_RATE
    frequency = np.exp(rng.uniform(np.log(150), np.log(4000)))
    wave = np.sin(2 * np.pi * frequency * time + rng.uniform(0, 6.28))
    if rng.random() < 0.2 and frequency < 3500:
        wave += rng.uniform(0.02, 0.2) * np.sin(4 * np.pi * frequency * time)
    return wave


def noise(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """White noise, Gaussian or uniform, sometimes coloured a little."""
    wave = rng.standard_normal(num_samples) if rng.random() < 0.7 else rng.uniform(-1, 1, num_samples)
    if rng.random() < 0.3:
        wave = wave + rng.uniform(-0.5, 0.7) * np.roll(wave, 1)
    return wave


def siren(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """A wail: the pitch sweeps up and down, as a sine, a triangle or between two tones."""
    time = np.arange(num_samples) / SAMPLE_RATE
    rate, phase = rng.uniform(0.4, 4.0), rng.uniform(0, 1)
    turn = (time * rate + phase) % 1
    shapes = (np.sin(2 * np.pi * turn), 4 * np.abs(turn - 0.5) - 1, np.sign(turn - 0.5))
    low = rng.uniform(350, 900)
    high = low * rng.uniform(1.4, 2.6)
    frequency = (low + high) / 2 + (high - low) / 2 * shapes[rng.integers(3)]
    angle = 2 * np.pi * np.cumsum(frequency) / SAMPLE_RATE
    overtones = rng.uniform(0, 0.5, 3)
    return np.sin(angle) + sum(a * np.sin((k + 2) * angle) for k, a in enumerate(overtones))


def clicks(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Short bursts with silence between them, regular or not."""
    wave = np.zeros(num_samples)
    gap = rng.uniform(0.08, 0.5) * SAMPLE_RATE
    jitter = rng.choice([0.0, 0.3])
    length = int(rng.integers(8, 120))
    burst = rng.standard_normal(length) * np.exp(-np.arange(length) / (length / 4))
    if rng.random() < 0.3:
        burst = np.ones(length)
    position = rng.uniform(0, 0.5) * gap
    while position + length < num_samples:
        wave[int(position) : int(position) + length] += burst
        position += gap * (1 + jitter * rng.uniform(-1, 1))
    return wave


def bell(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """One or more strokes of inharmonic partials that die away."""
    wave = np.zeros(num_samples)
    base = np.exp(rng.uniform(np.log(250), np.log(1400)))
    ratios = np.array([1.0, 2.0, 2.76, 3.76, 5.4, 6.8]) * rng.uniform(0.97, 1.03, 6)
    levels = rng.uniform(0.2, 1.0, 6) / np.arange(1, 7) ** 0.5
    period = rng.uniform(0.15, 1.5) * SAMPLE_RATE
    decay = rng.uniform(0.15, 0.8)
    start = rng.uniform(0, 0.15) * SAMPLE_RATE
    while start < num_samples - 1600:
        time = np.arange(num_samples - int(start)) / SAMPLE_RATE
        for ratio, level in zip(ratios, levels, strict=True):
            if base * ratio < 7500:
                wave[int(start) :] += (
                    level * np.sin(2 * np.pi * base * ratio * time) * np.exp(-time * ratio**0.5 / decay)
                )
        start += period
    return wave


def silence(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Nothing, or a noise floor of at most about -62 dBFS; its level is kept as drawn."""
    if rng.random() < 0.4:
        return np.zeros(num_samples)
    return rng.standard_normal(num_samples) * 10 ** rng.uniform(-5.5, -3.1)


SOUNDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "tone": tone,
    "noise": noise,
    "siren": siren,
    "clicks": clicks,
    "bell": bell,
    "silence": silence,
}


def make_sound(kind: str, rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """A sound of `kind` as float32; all but silence peak at 0.7."""
    wave = SOUNDS[kind](rng, num_samples)
    if kind != "silence":
        wave = wave * (0.7 / max(1e-6, float(np.abs(wave).max())))
    return wave.astype(np.float32)
