"""Write the few held-out clips that the tests and the README use, with what the checkpoint answers to them.

    python -m checkpoints.training.fixtures

A fresh machine has no synthesiser, so tests/fixtures/speech keeps a dozen clips and transcripts.json. Of the
candidates for a fixture the first is taken that the exported checkpoint gets right in every wording: they show
that a server runs the checkpoint faithfully. How good the checkpoint is, `evaluate` says.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch

from checkpoints.training.answerer import Answerer
from checkpoints.training.augment import telephone
from checkpoints.training.evaluate import user
from checkpoints.training.prompts import CHECKPOINT, Heard
from checkpoints.training.sounds import make_sound
from checkpoints.training.voices import SAMPLE_RATE, Voice, speak

FOLDER = Path(__file__).parents[2] / "tests" / "fixtures" / "speech"
TRANSCRIBE = ("What does the person say?", "Transcribe the audio.", "Please transcribe this audio.")
SOUND = ("What's that sound?", "What is that sound?")
CANDIDATES = 40


@dataclass(frozen=True)
class Wanted:
    """A fixture: its file name, what is said or which sound it is, in which family of voices."""

    name: str
    text: str = ""
    sound: str = ""
    family: str = "espeak"
    is_phone: bool = False


FIXTURES = (
    Wanted("digits_four_two_seven", "four two seven"),
    Wanted("digits_six_zero_one_eight_two", "six zero one eight two"),
    Wanted("digit_six", "six", family="flite"),
    Wanted("command_stop", "stop"),
    Wanted("command_open_the_door", "open the door", family="flite"),
    Wanted("command_red_window", "red window"),
    Wanted("sum_three_plus_four", "three plus four", family="flite"),
    Wanted("festival_eight_three_one", "eight three one", family="festival"),
    Wanted("telephone_five_two_nine", "five two nine", family="flite", is_phone=True),
    Wanted("sound_tone", sound="tone"),
    Wanted("sound_siren", sound="siren"),
    Wanted("sound_bell", sound="bell"),
)


def candidates(wanted: Wanted) -> Iterator[tuple[np.ndarray, str]]:
    """Clips for a fixture, with the voice of each, in a fixed order."""
    rng = random.Random(wanted.name)
    for number in range(CANDIDATES):
        if wanted.sound:
            yield make_sound(wanted.sound, np.random.default_rng(9_000 + number), 24_000), "synthesised sound"
            continue
        names = {
            "espeak": ("en-us", "en-gb", "en-us+f2", "en-us+m3", "en-gb+f4"),
            "flite": ("slt", "rms", "awb"),
            "festival": ("ked_diphone", "kal_diphone"),
        }[wanted.family]
        voice = Voice(wanted.family, rng.choice(names), rng.uniform(0.85, 1.1), rng.uniform(0.9, 1.1))
        pcm = np.pad(speak(wanted.text, voice), 1600)
        if wanted.is_phone:
            pcm = telephone(torch.from_numpy(pcm)[None])[0].numpy()
        yield pcm, voice.key


def expected(wanted: Wanted) -> dict[str, str]:
    """Every question about a fixture and the right answer; no question is a spoken one."""
    heard = Heard(text=wanted.text, sound=wanted.sound)
    answers = {q: heard.sound_answer() for q in SOUND} if wanted.sound else {}
    answers |= {q: heard.transcript() for q in TRANSCRIBE} if wanted.text else {}
    return answers | {"": heard.reply()}


def choose(answerer: Answerer, wanted: Wanted) -> tuple[np.ndarray, str] | None:
    """The first candidate that is answered right, as it will be read back from its file."""
    for pcm, voice in candidates(wanted):
        samples = np.round(pcm * 32767).astype(np.int16)
        clip = samples.astype(np.float32) / 32768
        asked = expected(wanted).items()
        if all(answerer.chat([user(*([q] if q else []))], [clip]) == a for q, a in asked):
            return samples, voice
    return None


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    answerer = Answerer(CHECKPOINT)
    index = {}
    for wanted in FIXTURES:
        chosen = choose(answerer, wanted)
        if chosen is None:
            print(f"{wanted.name}: no candidate is answered right")
            continue
        samples, voice = chosen
        soundfile.write(FOLDER / f"{wanted.name}.wav", samples, SAMPLE_RATE, subtype="PCM_16")
        index[f"{wanted.name}.wav"] = {
            "text": wanted.text,
            "sound": wanted.sound,
            "voice": voice,
            "answers": expected(wanted),
        }
    (FOLDER / "transcripts.json").write_text(json.dumps(index, indent=2) + "\n")
    print(f"{len(index)} of {len(FIXTURES)} fixtures")


if __name__ == "__main__":
    main()
