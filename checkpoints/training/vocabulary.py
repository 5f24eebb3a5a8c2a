"""The words, sentences and answers that the bundled checkpoint knows.

Everything here is plain data and small pure functions: which words are spoken, how utterances are drawn
from them, and what the right answer to an utterance is. It knows nothing about audio or tokens.
"""

from __future__ import annotations

import random

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Digits first: an arithmetic answer is an index into this tuple.
NUMBERS = (
    *DIGITS,
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
)

COMMANDS = tuple(
    "yes no up down left right on off stop go open close start pause play next back help louder quieter "
    "red green blue yellow light door music window cat dog bird house tree bed happy wow hello goodbye "
    "please cancel coffee water kitchen garden morning night".split()
)

PHRASES = (
    "turn on the light",
    "turn off the light",
    "turn on the music",
    "turn off the music",
    "open the door",
    "close the door",
    "open the window",
    "close the window",
    "play the next music",
    "stop the music",
    "play music",
    "start the music",
    "turn left",
    "turn right",
    "go back",
    "go up",
    "go down",
    "help please",
    "yes please",
    "the cat",
    "the dog",
    "the bird",
    "the red house",
    "the green tree",
    "the blue door",
    "the happy dog",
    "the yellow bird",
    "good morning",
    "good night",
    "coffee please",
    "the kitchen light",
    "turn off the kitchen light",
    "turn on the kitchen light",
)

WORDS = tuple(dict.fromkeys([*NUMBERS, *COMMANDS, "plus", "minus", *" ".join(PHRASES).split()]))

SOUND_ANSWERS = {
    "tone": "It is a pure tone.",
    "noise": "It is white noise.",
    "siren": "It is a siren.",
    "clicks": "It is the sound of clicks.",
    "bell": "It is a bell.",
    "silence": "It is silence.",
}
SPEECH_ANSWER = "It is a person speaking."
NO_SPEECH_ANSWER = "Nobody is speaking."
NO_AUDIO_ANSWER = "Please send me some audio."


def arithmetic_texts() -> list[str]:
    """Every sum of two digits, and every difference that is not negative."""
    sums = [f"{a} plus {b}" for a in DIGITS for b in DIGITS]
    differences = [f"{a} minus {b}" for i, a in enumerate(DIGITS) for b in DIGITS[: i + 1]]
    return sums + differences


def arithmetic_answer(text: str) -> str | None:
    """The value of "a plus b" or "a minus b" as a word, or None where the text is no such question."""
    words = text.split()
    if len(words) != 3 or words[0] not in DIGITS or words[2] not in DIGITS:
        return None
    left, right = DIGITS.index(words[0]), DIGITS.index(words[2])
    if words[1] == "plus":
        return NUMBERS[left + right]
    if words[1] == "minus" and left >= right:
        return NUMBERS[left - right]
    return None


def voice_chat_answer(text: str) -> str:
    """What a voice-chat user who said `text` is told; a sum is repeated, which makes its value easy to find."""
    value = arithmetic_answer(text)
    if value is not None:
        return f"{text} is {value}"
    if text in ("hello", "good morning"):
        return "Hello! How can I help?"
    if text in ("goodbye", "good night"):
        return "Goodbye!"
    return f"You said: {text}."


def draw_text(rng: random.Random) -> str:
    """One utterance: mostly single words and digit strings, some phrases, mixtures and sums."""
    kind = rng.random()
    if kind < 0.14:
        return rng.choice(DIGITS)
    if kind < 0.34:
        return rng.choice(WORDS)
    if kind < 0.62:
        return " ".join(rng.choices(DIGITS, k=rng.choice((2, 2, 3, 3, 4, 4, 5, 6))))
    if kind < 0.74:
        return " ".join(rng.choices(COMMANDS, k=rng.choice((2, 2, 3))))
    if kind < 0.82:
        return " ".join(rng.choice(rng.choice((DIGITS, COMMANDS))) for _ in range(rng.choice((2, 3, 4))))
    if kind < 0.90:
        return rng.choice(PHRASES)
    return rng.choice(arithmetic_texts())
