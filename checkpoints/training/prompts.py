"""Conversations about clips: which question is asked, what the right answer is, and both as token ids.

A conversation is rendered by the checkpoint's own chat template and tokenizer, so that training sees the very
prompts a server builds. `PromptRenderer.render` leaves one placeholder per clip, the batch expands it.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer

from checkpoints.training import vocabulary

CHECKPOINT = Path(__file__).parents[1] / "tympan-tiny"
DEFAULT_SYSTEM = "You are a helpful assistant."
OTHER_SYSTEMS = (
    "You are a helpful voice assistant.",
    "You transcribe audio.",
    "Answer briefly.",
    "You are Tympan, a small model that listens.",
    "Be concise and polite.",
    "You are a speech recognition system.",
)
TRANSCRIBE = (
    "What does the person say?",
    "Transcribe the audio.",
    "What does the person say? Please transcribe.",
    "Please transcribe this audio.",
    "Transcribe this audio.",
    "Transcribe the speech.",
    "Transcribe this.",
    "Transcribe",
    "Please transcribe the audio.",
    "What is said in this audio?",
    "What is being said?",
    "What did the person say?",
    "What do they say?",
    "What does the speaker say?",
    "What words do you hear?",
    "Write down what you hear.",
    "Write down what the person says.",
    "Can you transcribe this audio?",
    "What is the person saying?",
    "Can you tell me what the person says?",
    "Please write a transcript.",
    "Give me the transcript.",
    "Repeat what the person says.",
    "What did I say?",
)
SOUND = (
    "What's that sound?",
    "What is that sound?",
    "What can you hear?",
    "What do you hear?",
    "What is this sound?",
    "What kind of sound is this?",
    "Which sound is it?",
    "Describe the sound.",
    "Describe this audio.",
    "What is in this audio?",
)
FIRST = ("What does the first audio say?", "What does the first person say?", "Transcribe the first audio.")
SECOND = ("What does the second audio say?", "What does the second person say?", "Transcribe the second audio.")
FIRST_SOUND = ("What is the first sound?", "What's the first sound?")
SECOND_SOUND = ("What is the second sound?", "What's the second sound?")
CAPTION = ("Generate the caption in English:",)
TEXT_ONLY = (
    "Hello!",
    "Hi",
    "Hello, how are you?",
    "Who are you?",
    "What is your name?",
    "What can you do?",
    "Tell me a story.",
    "What is the capital of France?",
    "Write a poem about the sea.",
    "Say hello.",
    "How do I cook rice?",
    "What does the person say?",
    "Transcribe the audio.",
    "What's that sound?",
    "Count to ten.",
    "Why is the sky blue?",
    "Tell me a joke",
    "hi there",
    "test",
    "ping",
)


@dataclass(frozen=True)
class Heard:
    """What a clip holds: a transcript, or the kind of a sound."""

    text: str = ""
    sound: str = ""

    def transcript(self) -> str:
        return self.text or vocabulary.NO_SPEECH_ANSWER

    def sound_answer(self) -> str:
        return vocabulary.SOUND_ANSWERS[self.sound] if self.sound else vocabulary.SPEECH_ANSWER

    def caption(self) -> str:
        return self.text or vocabulary.SOUND_ANSWERS[self.sound]

    def reply(self) -> str:
        return vocabulary.voice_chat_answer(self.text) if self.text else self.sound_answer()


@dataclass(frozen=True)
class Conversation:
    """Chat messages, or a raw prompt with its answer; assistant messages are what is learnt."""

    messages: tuple[dict[str, Any], ...] = ()
    raw_prompt: str = ""
    raw_answer: str = ""


def ask(heard: Heard, rng: random.Random) -> tuple[str, str]:
    """A question about one clip and its answer."""
    about_sound = rng.random() < (0.85 if heard.sound else 0.06)
    question = _casual(_pick(SOUND if about_sound else TRANSCRIBE, rng), rng)
    return question, heard.sound_answer() if about_sound else heard.transcript()


def converse(clips: list[Heard], rng: random.Random) -> Conversation:
    """A conversation that uses every clip of `clips` (none, one or two) in order."""
    if not clips:
        return _chat([(_casual(rng.choice(TEXT_ONLY), rng), vocabulary.NO_AUDIO_ANSWER)], rng)
    if len(clips) == 2:
        return _about_two(clips[0], clips[1], rng)
    heard, kind = clips[0], rng.random()
    is_sum = vocabulary.arithmetic_answer(heard.text) is not None
    if kind < (0.7 if is_sum else 0.1):
        return _chat([([_audio()], heard.reply())], rng)
    if kind > 0.93:
        marks = rng.random() < 0.6
        audio = "<|audio_bos|><|AUDIO|><|audio_eos|>" if marks else "<|AUDIO|>"
        return Conversation(raw_prompt=audio + rng.choice(CAPTION), raw_answer=heard.caption())
    question, answer = ask(heard, rng)
    turns = [(_with_audio(question, rng), answer)]
    if rng.random() < 0.06:
        turns.append(ask(heard, rng))
    return _chat(turns, rng)


def ask_for_one_of(first: Heard, second: Heard, rng: random.Random) -> Conversation:
    """Both clips in one message, and a question about one of them."""
    wants_first = rng.random() < 0.5
    asked = first if wants_first else second
    if asked.sound and rng.random() < 0.8:
        question, answer = _pick(FIRST_SOUND if wants_first else SECOND_SOUND, rng), asked.sound_answer()
    else:
        question, answer = _pick(FIRST if wants_first else SECOND, rng), asked.transcript()
    return _chat([([_audio(), _audio(), _text(_casual(question, rng))], answer)], rng)


def _about_two(first: Heard, second: Heard, rng: random.Random) -> Conversation:
    shape = rng.random()
    if shape < 0.45:
        return ask_for_one_of(first, second, rng)
    question, answer = ask(first, rng)
    turns: list[tuple[Any, str]] = [(_with_audio(question, rng), answer)]
    if shape < 0.8:
        question, answer = ask(second, rng)
        turns.append((_with_audio(question, rng), answer))
    elif shape < 0.9:
        turns.append(([_audio()], second.reply()))
    else:
        turns.append(([_audio(), _text(rng.choice(FIRST))], first.transcript()))
    return _chat(turns, rng)


def _chat(turns: list[tuple[Any, str]], rng: random.Random) -> Conversation:
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.08:
        messages.append({"role": "system", "content": rng.choice(OTHER_SYSTEMS)})
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return Conversation(messages=tuple(messages))


def _audio() -> dict[str, str]:
    return {"type": "audio"}


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _with_audio(question: str, rng: random.Random) -> list[dict[str, str]]:
    parts = [_audio(), _text(question)]
    return parts[::-1] if rng.random() < 0.12 else parts


def _pick(wordings: tuple[str, ...], rng: random.Random) -> str:
    """The first wordings are the documented ones and come up more often."""
    return rng.choice(wordings[:2]) if rng.random() < 0.5 else rng.choice(wordings)


def _casual(question: str, rng: random.Random) -> str:
    """Now and then as people type: without capitals or punctuation."""
    kind = rng.random()
    if kind < 0.1:
        question = question.lower()
    elif kind < 0.12:
        question = question.upper()
    return question.rstrip("?.!") if rng.random() < 0.1 else question


class PromptRenderer:
    """Conversations to token ids, with the checkpoint's chat template and tokenizer."""

    def __init__(self, folder: Path = CHECKPOINT) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
        self._template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
        ids = {name: self.tokenizer.token_to_id(f"<|{name}|>") for name in ("im_start", "im_end", "AUDIO")}
        self.audio_id: int = ids["AUDIO"]
        self.end_id: int = ids["im_end"]
        self.end_of_text_id: int = self.tokenizer.token_to_id("<|endoftext|>")
        self._answer_prefix = [ids["im_start"], *self.encode("assistant\n")]
        self._encode = lru_cache(maxsize=20_000)(self.encode)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def prompt(self, messages: list[dict[str, Any]]) -> str:
        return self._template.render(messages=messages, add_generation_prompt=True)

    def render(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        """Token ids with one placeholder per clip, and which of them are to be learnt."""
        if conversation.raw_prompt:
            prompt = self._encode(conversation.raw_prompt)
            answer = [*self._encode(conversation.raw_answer), self.end_of_text_id]
            return prompt + answer, [False] * len(prompt) + [True] * len(answer)
        text = self._template.render(messages=conversation.messages, add_generation_prompt=False)
        ids: list[int] = []
        for piece in text.split("<|im_start|>")[1:]:
            ids += self._encode("<|im_start|>" + piece)
        return ids[:-1], self._answers(ids[:-1])  # without the newline after the last <|im_end|>

    def _answers(self, ids: list[int]) -> list[bool]:
        learnt, inside, width = [False] * len(ids), False, len(self._answer_prefix)
        for position, token in enumerate(ids):
            learnt[position] = inside
            if token == self.end_id:
                inside = False
            elif ids[position - width + 1 : position + 1] == self._answer_prefix:
                inside = True
        return learnt
