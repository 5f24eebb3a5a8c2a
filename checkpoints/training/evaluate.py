"""Measure an exported checkpoint on held-out audio and print the model card's table.

    python -m checkpoints.training.evaluate

Everything goes through `model/`, the chat template and the exported files, one conversation at a time. Needs
the cache that `checkpoints.training.synthesise` makes; sounds are drawn from seeds that training never uses.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoints.training import vocabulary
from checkpoints.training.answerer import Answerer
from checkpoints.training.augment import telephone
from checkpoints.training.batches import ClipStore
from checkpoints.training.listen import word_error_rate
from checkpoints.training.prompts import CHECKPOINT
from checkpoints.training.sounds import SOUNDS, make_sound
from checkpoints.training.synthesise import CACHE
from checkpoints.training.voices import FESTIVAL_VOICES

TRANSCRIBE = ("What does the person say?", "Transcribe the audio.")
PAIRS = 150


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    name: str
    count: int
    measure: str
    value: float
    target: str = ""

    def __str__(self) -> str:
        return f"| {self.name} | {self.count} | {self.measure} | {self.value:.1%} | {self.target} |"


def user(*texts: str, audios: int = 1) -> dict[str, Any]:
    """A user message of `audios` clips and then text."""
    parts = [{"type": "audio"}] * audios + [{"type": "text", "text": text} for text in texts]
    return {"role": "user", "content": parts}


def transcription(answerer: Answerer, name: str, clips: Iterable[tuple[np.ndarray, str]], target: str) -> Line:
    """Word error rate of both documented wordings, taken in turn."""
    references, hypotheses = [], []
    for number, (pcm, text) in enumerate(clips):
        references.append(text)
        hypotheses.append(answerer.chat([user(TRANSCRIBE[number % 2])], [pcm]))
    rate = word_error_rate(references, hypotheses)
    return Line(name, len(references), "word error rate", rate, target)


def accuracy(name: str, cases: Iterable[tuple[str, str]], target: str = "") -> Line:
    """The share of (answer, wanted) that are equal."""
    hits = [answer == wanted for answer, wanted in cases]
    return Line(name, len(hits), "right answers", sum(hits) / max(1, len(hits)), target)


def stored(store: ClipStore, only: Callable[[int], bool] = lambda _: True) -> list[tuple[np.ndarray, str]]:
    return [(store.pcm(i), store.text(i)) for i in range(len(store)) if only(i)]


def is_digits(text: str) -> bool:
    return set(text.split()) <= set(vocabulary.DIGITS)


def speech_lines(answerer: Answerer) -> list[Line]:
    held_out, unseen = ClipStore(CACHE, ["held_out"]), ClipStore(CACHE, ["unseen"])
    clips = stored(held_out)
    narrow = [(telephone(torch.from_numpy(pcm)[None])[0].numpy(), text) for pcm, text in clips]
    lines = [
        transcription(answerer, "unseen utterances, training voices", clips, "4 %"),
        transcription(answerer, "of these, digit strings", [c for c in clips if is_digits(c[1])], ""),
        transcription(answerer, "the same at 8 kHz, 300-3400 Hz, mu-law", narrow, "10 %"),
        transcription(answerer, "festival, never trained on", stored(unseen), "8 %"),
    ]
    for voice in FESTIVAL_VOICES:
        own = stored(unseen, lambda i, voice=voice: unseen.voice(i).endswith(voice))  # type: ignore[misc]
        lines.append(transcription(answerer, f"of these, {voice}", own, ""))
    return lines


def sound_clips(seed: int, per_kind: int) -> list[tuple[np.ndarray, str]]:
    rng = np.random.default_rng(seed)
    return [
        (make_sound(kind, rng, int(rng.uniform(0.8, 4) * 16_000)), kind)
        for kind in SOUNDS
        for _ in range(per_kind)
    ]


def sound_lines(answerer: Answerer) -> list[Line]:
    clips = sound_clips(seed=10_000_019, per_kind=40)
    question = [user("What's that sound?")]
    cases = [(answerer.chat(question, [pcm]), vocabulary.SOUND_ANSWERS[kind], kind) for pcm, kind in clips]
    lines = [accuracy("What's that sound?", [(a, w) for a, w, _ in cases], "95 %")]
    for kind in SOUNDS:
        lines.append(accuracy(f"of these, {kind}", [(a, w) for a, w, k in cases if k == kind]))
    return lines


def skill_lines(answerer: Answerer) -> list[Line]:
    rng = random.Random(7)
    sums = stored(ClipStore(CACHE, ["sums"]))
    said = [(answerer.chat([user()], [pcm]), str(vocabulary.arithmetic_answer(text))) for pcm, text in sums]
    clips = stored(ClipStore(CACHE, ["held_out"]), lambda i: i < 450)
    two_audios, two_turns, captions = [], [], []
    for number in range(PAIRS):
        (first, first_text), (second, second_text) = rng.sample(clips, 2)
        which, wanted = (("first", first_text), ("second", second_text))[number % 2]
        question = user(f"What does the {which} audio say?", audios=2)
        two_audios.append((answerer.chat([question], [first, second]), wanted))
        history = [user(TRANSCRIBE[0]), {"role": "assistant", "content": first_text}, user(TRANSCRIBE[0])]
        two_turns.append((answerer.chat(history, [first, second]), second_text))
        marks = ("<|audio_bos|>", "<|audio_eos|>") if number % 2 else ("", "")
        prompt = f"{marks[0]}<|AUDIO|>{marks[1]}Generate the caption in English:"
        captions.append((answerer.complete(prompt, [first]), first_text))
    return [
        accuracy("voice chat: a spoken sum or difference", said),
        accuracy("two audios in a message, the first or second asked for", two_audios),
        accuracy("second turn about a second clip", two_turns),
        accuracy("raw caption prompt", captions),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=CHECKPOINT)
    args = parser.parse_args()
    answerer = Answerer(args.folder)
    print("| held-out measure | clips | what | result | target |\n| --- | --- | --- | --- | --- |")
    for lines in (speech_lines, sound_lines, skill_lines):
        for line in lines(answerer):
            print(line, flush=True)


if __name__ == "__main__":
    main()
