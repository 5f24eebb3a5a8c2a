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


@dataclass(frozen=True)
class Heard:
    """What was said in a clip, in which voice, and what the checkpoint heard."""

    text: str
    answer: str
    voice: str


def listen(answerer: Answerer, store: ClipStore, through: Callable[[np.ndarray], np.ndarray]) -> list[Heard]:
    """Every clip of a set, asked for in both documented wordings in turn."""
    heard = []
    for number in range(len(store)):
        answer = answerer.chat([user(TRANSCRIBE[number % 2])], [through(store.pcm(number))])
        heard.append(Heard(store.text(number), answer, store.voice(number)))
    return heard


def word_errors_of(name: str, heard: list[Heard], target: str = "") -> Line:
    rate = word_error_rate([h.text for h in heard], [h.answer for h in heard])
    return Line(name, len(heard), "word error rate", rate, target)


def accuracy(name: str, cases: Iterable[tuple[str, str]], target: str = "") -> Line:
    """The share of (answer, wanted) that are equal."""
    hits = [answer == wanted for answer, wanted in cases]
    return Line(name, len(hits), "right answers", sum(hits) / max(1, len(hits)), target)


def stored(store: ClipStore) -> list[tuple[np.ndarray, str]]:
    return [(store.pcm(i), store.text(i)) for i in range(len(store))]


def by_telephone(pcm: np.ndarray) -> np.ndarray:
    return telephone(torch.from_numpy(pcm)[None])[0].numpy()


def is_digits(text: str) -> bool:
    return set(text.split()) <= set(vocabulary.DIGITS)


def speech_lines(answerer: Answerer) -> list[Line]:
    held_out, unseen = ClipStore(CACHE, ["held_out"]), ClipStore(CACHE, ["unseen"])
    own = listen(answerer, held_out, lambda pcm: pcm)
    narrow = listen(answerer, held_out, by_telephone)
    festival = listen(answerer, unseen, lambda pcm: pcm)
    return [
        word_errors_of("unseen utterances, training voices", own, "4 %"),
        word_errors_of("of these, digit strings", [h for h in own if is_digits(h.text)]),
        word_errors_of("of these, flite's voices", [h for h in own if h.voice.startswith("flite")]),
        word_errors_of("the same at 8 kHz, 300-3400 Hz, mu-law", narrow, "10 %"),
        word_errors_of("festival, never trained on", festival, "8 %"),
        word_errors_of("of these, digit strings", [h for h in festival if is_digits(h.text)]),
        *(
            word_errors_of(f"of these, `{name}`", [h for h in festival if h.voice.endswith(name)])
            for name in FESTIVAL_VOICES
        ),
    ]


def sound_clips(seed: int, per_kind: int) -> list[tuple[np.ndarray, str]]:
    rng = np.random.default_rng(seed)
    return [
        (make_sound(kind, rng, int(rng.uniform(0.8, 4) * 16_000)), kind) for kind in SOUNDS for _ in range(per_kind)
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
    said = [(answerer.chat([user()], [pcm]), vocabulary.voice_chat_answer(text)) for pcm, text in sums]
    clips = stored(ClipStore(CACHE, ["held_out"]))[:450]
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
