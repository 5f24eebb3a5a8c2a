"""The speech synthesisers and the voices they offer, each a function from text to 16 kHz PCM.

espeak-ng, flite and Pico are heard in training. festival's diphone and HTS voices never are: they
measure how the checkpoint does on a speaker it was not shown. Needs espeak-ng, flite and festival on PATH, and
for the set "pico" the package py-nanotts (SVOX Pico with its voices).
"""

from __future__ import annotations

import importlib
import io
import random
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000

ESPEAK_ACCENTS = (
    "en-gb",
    "en-us",
    "en-us",
    "en-us",
    "en-gb-scotland",
    "en-gb-x-gbclan",
    "en-gb-x-rp",
    "en-gb-x-gbcwmd",
    "en-029",
    "en-us-nyc",
)
ESPEAK_VARIANTS = (
    "m1 m2 m3 m4 m5 m6 m7 m8 f1 f2 f3 f4 f5 croak whisper whisperf klatt klatt2 klatt3 klatt4 klatt6 "
    "adam Alex Alicia Andrea Andy Annie antonio aunty belinda benjamin boris caleb david Denis Diogo ed "
    "edward Gene Gene2 grandma grandpa Henrique Hugo Jacky john Lee linda marcelo Marco Mario Michael "
    "michel miguel Mike norbert pablo paul pedro quincy rob robert sandro shelby steph steph2 travis victor "
    "Zac anika iven iven2 announcer"
).split()
FLITE_VOICES = ("kal", "kal16", "awb", "rms", "slt")
FESTIVAL_VOICES = ("kal_diphone", "ked_diphone", "cmu_us_slt_arctic_hts")


@dataclass(frozen=True)
class Voice:
    """One way of speaking: a synthesiser, its voice and the knobs it was given."""

    family: str  # espeak, flite, pico or festival
    name: str
    speed: float = 1.0
    pitch: float = 1.0

    @property
    def key(self) -> str:
        return f"{self.family}:{self.name}"


def draw_voice(rng: random.Random) -> Voice:
    """A training voice with random speed and pitch: two thirds espeak-ng, one third flite."""
    speed = float(np.clip(rng.gauss(1.0, 0.17), 0.65, 1.45))
    pitch = float(np.clip(rng.gauss(1.0, 0.22), 0.5, 1.6))
    if rng.random() < 0.62:
        name = f"{rng.choice(ESPEAK_ACCENTS)}+{rng.choice(ESPEAK_VARIANTS)}"
        return Voice("espeak", name, speed, pitch)
    return Voice("flite", rng.choice(FLITE_VOICES), speed, pitch)


def draw_pico_voice(rng: random.Random) -> Voice:
    speed = float(np.clip(rng.gauss(1.0, 0.17), 0.65, 1.5))
    pitch = float(np.clip(rng.gauss(0.95, 0.22), 0.5, 1.6))
    return Voice("pico", rng.choice(("en-US", "en-GB")), speed, pitch)


def speak(text: str, voice: Voice) -> np.ndarray:
    """`text` in `voice` as float32 mono at 16 kHz, silence at both ends trimmed."""
    if voice.family == "pico":
        return trim(_pico(text, voice))
    wav = {"espeak": _espeak, "flite": _flite, "festival": _festival}[voice.family](text, voice)
    pcm, rate = soundfile.read(io.BytesIO(wav), dtype="float32")
    if rate != SAMPLE_RATE:
        pcm = soxr.resample(pcm, rate, SAMPLE_RATE)
    return trim(pcm)


def trim(pcm: np.ndarray, margin: int = 480) -> np.ndarray:
    """Cut what is 40 dB below the peak at both ends, but for a margin; scale the peak to 0.7."""
    peak = float(np.abs(pcm).max()) if pcm.size else 0.0
    if peak < 1e-4:
        return np.zeros(0, np.float32)
    loud = np.flatnonzero(np.abs(pcm) > 0.01 * peak)
    start, stop = max(0, loud[0] - margin), min(pcm.size, loud[-1] + margin)
    return (pcm[start:stop] * (0.7 / peak)).astype(np.float32)


def _espeak(text: str, voice: Voice) -> bytes:
    words_per_minute, pitch = round(155 * voice.speed), round(min(95, max(5, 50 * voice.pitch)))
    command = ["espeak-ng", "-v", voice.name, "-s", str(words_per_minute), "-p", str(pitch), "--stdout", text]
    return subprocess.run(command, capture_output=True, check=True, timeout=30).stdout


def _flite(text: str, voice: Voice) -> bytes:
    base = {"kal": 95, "kal16": 95, "awb": 110, "rms": 100, "slt": 170}[voice.name]
    settings = [f"duration_stretch={1 / voice.speed:.3f}", f"int_f0_target_mean={base * voice.pitch:.1f}"]
    with tempfile.NamedTemporaryFile(suffix=".wav") as out:
        command = ["flite", "-voice", voice.name, "-t", text, "-o", out.name]
        for setting in settings:
            command[1:1] = ["--setf", setting]
        subprocess.run(command, capture_output=True, check=True, timeout=30)
        return Path(out.name).read_bytes()


def _festival(text: str, voice: Voice) -> bytes:
    stretch = f"(Parameter.set 'Duration_Stretch {1 / voice.speed:.3f})"
    with tempfile.NamedTemporaryFile(suffix=".wav") as out:
        command = ["text2wave", "-eval", f"(voice_{voice.name})", "-eval", stretch, "-o", out.name]
        subprocess.run(command, input=text.encode(), capture_output=True, check=True, timeout=60)
        return Path(out.name).read_bytes()


def _pico(text: str, voice: Voice) -> np.ndarray:
    speaker = importlib.import_module("py_nanotts").NanoTTS()
    pcm = speaker.speak(text, voice=voice.name, speed=voice.speed, pitch=voice.pitch)
    return np.frombuffer(pcm, dtype="<i2").astype(np.float32) / 32768
