"""What the microphone hears, as a WAV file in memory. Needs the optional package sounddevice, and says so."""

from __future__ import annotations

import importlib
import io
import wave
from collections.abc import Callable
from typing import Any

from tympan.cli.errors import CommandError

SAMPLE_RATE = 16_000
"""Hz: what the model hears."""
BYTES_PER_SAMPLE = 2


def record(seconds: float | None, tell: Callable[[str], None]) -> tuple[bytes, float]:
    """Record so long, or until Enter is pressed. -> (WAV of one channel, its seconds). Raises CommandError."""
    sounddevice = _sounddevice()
    blocks: list[bytes] = []

    def take(block: Any, *_: object) -> None:
        blocks.append(bytes(block))

    try:
        with sounddevice.RawInputStream(samplerate=SAMPLE_RATE, channels=1, dtype="int16", callback=take):
            if seconds is None:
                tell("listening; Enter ends it")
                input()
            else:
                tell(f"listening for {seconds:g} s")
                sounddevice.sleep(round(1000 * seconds))
    except sounddevice.PortAudioError as error:
        raise CommandError(f"the microphone cannot be used: {error}") from None
    samples = b"".join(blocks)
    if not samples:
        raise CommandError("the microphone gave nothing")
    return _wav(samples), len(samples) / BYTES_PER_SAMPLE / SAMPLE_RATE


def _sounddevice() -> Any:
    try:
        return importlib.import_module("sounddevice")
    except ModuleNotFoundError:
        message = (
            "the microphone needs the package sounddevice: pip install 'tympan[microphone]'; or use /audio FILE"
        )
        raise CommandError(message) from None
    except OSError as error:  # the package is there, the library that it wraps is not
        raise CommandError(f"the microphone needs PortAudio ({error}): apt-get install libportaudio2") from None


def _wav(samples: bytes) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(BYTES_PER_SAMPLE)
        writer.setframerate(SAMPLE_RATE)
        writer.writeframes(samples)
    return file.getvalue()
