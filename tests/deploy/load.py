"""A few clients that ask one after the other, and count what they lose."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import soundfile
from openai import OpenAI, OpenAIError

from tests.deploy.conftest import ROOT

SPEECH = ROOT / "tests/fixtures/speech"
FILE = SPEECH / "digits_four_two_seven.wav"
SAID = "four two seven"


def question(text: str = "What does the person say?", clip: bytes | None = None, **more: Any) -> dict[str, Any]:
    """What the bundled checkpoint understands."""
    data = base64.b64encode(FILE.read_bytes() if clip is None else clip).decode()
    parts = [
        {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}},
        {"type": "text", "text": text},
    ]
    return {"model": "tympan-tiny", "messages": [{"role": "user", "content": parts}], "temperature": 0, **more}


def ask(client: OpenAI) -> str:
    """A whole answer."""
    return str(client.chat.completions.create(**question()).choices[0].message.content)


def ask_streaming(client: OpenAI) -> str:
    """The same, streamed."""
    chunks = client.chat.completions.create(**question(stream=True))
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def ask_in_session(client: OpenAI) -> str:
    """Whole, as a turn of a conversation that wants to stay where it is."""
    return ask(client.with_options(default_headers={"X-Session-Id": "one"}))


def _large_file() -> bytes:
    """The clip at six times its rate, in stereo and doubles: over 1 MiB, which proxies do not keep by themselves."""
    samples, rate = soundfile.read(FILE, dtype="float32")
    buffer = io.BytesIO()
    soundfile.write(buffer, np.repeat(np.stack([samples] * 2, 1), 6, 0), 6 * rate, format="WAV", subtype="DOUBLE")
    assert len(buffer.getvalue()) > 1 << 20
    return buffer.getvalue()


LARGE_FILE = _large_file()


def upload(client: OpenAI) -> str:
    """A transcription of a large file."""
    return client.audio.transcriptions.create(model="tympan-tiny", file=("a.wav", LARGE_FILE), temperature=0).text


Way = Callable[[OpenAI], str]
CHATTING: tuple[Way, ...] = (ask, ask_streaming, ask_in_session, ask_streaming)


@dataclass
class Tally:
    """What the clients got."""

    num_answers: int = 0
    lost_whole: list[str] = field(default_factory=list)
    lost_streams: list[str] = field(default_factory=list)

    @property
    def lost(self) -> list[str]:
        return self.lost_whole + self.lost_streams


@contextmanager
def under_load(client: OpenAI, ways: Iterable[Way] = (*CHATTING, upload)) -> Iterator[Tally]:
    """Clients ask until the block ends, each in its way; the tally is complete then."""
    tally, stop, lock = Tally(), threading.Event(), threading.Lock()

    def run(once: Way) -> None:
        while not stop.is_set():
            try:
                answer = once(client)
                lost = "" if SAID in answer.lower() else f"answered {answer!r}"
            except OpenAIError as error:
                lost = f"{once.__name__}: {error!r}"
            with lock:
                tally.num_answers += not lost
                if lost:
                    (tally.lost_streams if once is ask_streaming else tally.lost_whole).append(lost)

    threads = [threading.Thread(target=run, args=(once,)) for once in ways]
    for thread in threads:
        thread.start()
    try:
        yield tally
    finally:
        stop.set()
        for thread in threads:
            thread.join(90)
