"""A few clients that ask one after the other, and count what they lose."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from openai import OpenAI, OpenAIError

from tests.deploy.conftest import ROOT

CLIP = base64.b64encode((ROOT / "tests/fixtures/speech/digits_four_two_seven.wav").read_bytes()).decode()
SAID = "four two seven"
NUM_CLIENTS = 4


def question(**more: Any) -> dict[str, Any]:
    """What the bundled checkpoint understands."""
    parts = [
        {"type": "input_audio", "input_audio": {"data": CLIP, "format": "wav"}},
        {"type": "text", "text": "What does the person say?"},
    ]
    return {"model": "tympan-tiny", "messages": [{"role": "user", "content": parts}], "temperature": 0, **more}


def ask(client: OpenAI) -> str:
    """A whole answer."""
    return str(client.chat.completions.create(**question()).choices[0].message.content)


def ask_streaming(client: OpenAI) -> str:
    """The same, streamed."""
    chunks = client.chat.completions.create(**question(stream=True))
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


@dataclass
class Tally:
    """What the clients got."""

    num_answers: int = 0
    lost_whole: list[str] = field(default_factory=list)
    lost_streams: list[str] = field(default_factory=list)


@contextmanager
def under_load(client: OpenAI) -> Iterator[Tally]:
    """Clients ask until the block ends; the tally is complete then."""
    tally, stop, lock = Tally(), threading.Event(), threading.Lock()

    def run(is_streaming: bool) -> None:
        while not stop.is_set():
            try:
                answer = ask_streaming(client) if is_streaming else ask(client)
                lost = "" if SAID in answer else f"answered {answer!r}"
            except OpenAIError as error:
                lost = repr(error)
            with lock:
                tally.num_answers += not lost
                if lost:
                    (tally.lost_streams if is_streaming else tally.lost_whole).append(lost)

    threads = [threading.Thread(target=run, args=(index % 2 == 1,)) for index in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield tally
    finally:
        stop.set()
        for thread in threads:
            thread.join(90)
