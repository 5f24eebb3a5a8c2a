"""`tympan chat`: talk with a server in the terminal, by text, files and microphone; or one question through a pipe.

A conversation is the list of OpenAI's messages, sent whole with each turn (the server's prefix cache computes only
what is new). Ctrl-C stops an answer and keeps what has come of it; at the prompt it ends the conversation.
"""

from __future__ import annotations

import base64
import importlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from tympan.cli.endpoint import Endpoint, check, first_model
from tympan.cli.errors import CommandError
from tympan.cli.microphone import record

HELP = """\
/audio FILE...  add audio to the next message
/mic [SECONDS]  add what the microphone hears: until Enter, or so long
/send           send the audio without a question
/reset          forget the conversation
/save FILE      write the conversation as the body of a request
/quit           end, as Ctrl-D does"""

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a person may set; None leaves it to the server."""

    max_tokens: int | None = None
    temperature: float | None = None

    @property
    def body(self) -> dict[str, Any]:
        """Fields of a request."""
        values = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(slots=True)
class Conversation:
    """Messages so far, and audio that waits for the next one."""

    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    clips: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all but the system prompt."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.clips = []

    def add_audio(self, data: bytes, kind: str = "wav") -> None:
        """Put a clip before the text of the next message. kind: the file's suffix, which servers may look at."""
        audio = {"data": base64.b64encode(data).decode(), "format": kind}
        self.clips.append({"type": "input_audio", "input_audio": audio})

    def ask(self, text: str) -> None:
        """Add the person's turn."""
        if not self.clips:
            self.messages.append({"role": "user", "content": text})
            return
        parts = [*self.clips, *([{"type": "text", "text": text}] if text else [])]
        self.messages.append({"role": "user", "content": parts})
        self.clips = []

    def take_back(self) -> None:
        """The last turn, which has no answer: its audio waits again."""
        content = self.messages.pop()["content"]
        self.clips = [part for part in content if part["type"] == "input_audio"] if isinstance(content, list) else []


@dataclass(slots=True)
class Answer:
    """One answer while it streams."""

    started: float = field(default_factory=time.monotonic)
    first: float | None = None
    """When its first text came."""
    num_tokens: int = 0
    text: str = ""

    def summary(self) -> str:
        """For a person who measures: time to the first token, and the rate of the others."""
        if self.first is None:
            return ""
        words = f"first token after {self.first - self.started:.2f} s"
        seconds = time.monotonic() - self.first
        if self.num_tokens > 1 and seconds > 0:
            words += f", then {(self.num_tokens - 1) / seconds:.0f} tokens/s"
        return words


def run(
    endpoint: Endpoint, files: Sequence[Path], model: str | None, system: str | None, sampling: Sampling
) -> None:
    """Talk until the person ends it; through a pipe, once. Raises CommandError."""
    conversation = Conversation(system)
    for path in files:
        conversation.add_audio(read_clip(path), path.suffix.lstrip(".").lower() or "wav")
    with endpoint.failures(), endpoint.client() as client:
        chat = Chat(client, model or first_model(client), conversation, sampling)
        if sys.stdin.isatty():
            chat.talk()
        else:
            chat.answer_once(sys.stdin.read())


def read_clip(path: Path) -> bytes:
    """Raises CommandError that names the file."""
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}") from None


class Chat:
    """A conversation with one server."""

    def __init__(self, client: httpx.Client, model: str, conversation: Conversation, sampling: Sampling) -> None:
        self._client = client
        self._model = model
        self._conversation = conversation
        self._sampling = sampling
        self._console = Console(highlight=False, stderr=True)
        self._commands: dict[str, Callable[[Sequence[str]], None]] = {
            "/audio": self._add_files,
            "/mic": self._add_microphone,
            "/send": lambda _: self._ask(""),
            "/reset": self._reset,
            "/save": self._save,
            "/help": lambda _: self._tell(HELP),
        }

    def answer_once(self, text: str) -> None:
        """A question through a pipe: the answer, and nothing else, goes to standard output."""
        text = text.strip()
        if not text and not self._conversation.clips:
            raise CommandError("there is no question on standard input, and no audio", status=2)
        self._conversation.ask(text)
        self._write(Answer())
        sys.stdout.write("\n")

    def talk(self) -> None:
        """Turns until /quit or the end of input."""
        with suppress(ImportError):
            importlib.import_module("readline")  # `input` edits lines and has a history once it is there
        self._tell(f"{self._model}; /help tells what else than text may be written")
        with suppress(EOFError, KeyboardInterrupt):
            while (line := self._read_line()) not in ("/quit", "/exit"):
                try:
                    self._take(line)
                except CommandError as error:
                    self._tell(str(error), style="red")
        self._console.print()

    def _read_line(self) -> str:
        clips = len(self._conversation.clips)
        return input(f"[{clips} audio] > " if clips else "> ").strip()

    def _take(self, line: str) -> None:
        if not line.startswith("/"):
            if line:
                self._ask(line)
            return
        try:
            name, *arguments = shlex.split(line)
        except ValueError as error:
            raise CommandError(f"{line}: {error}") from None
        if name not in self._commands:
            raise CommandError(f"there is no {name}; /help has the list")
        self._commands[name](arguments)

    def _ask(self, text: str) -> None:
        if not text and not self._conversation.clips:
            raise CommandError("there is no audio to send: add some with /audio or /mic")
        self._conversation.ask(text)
        answer = Answer()
        try:
            self._write(answer)
        except KeyboardInterrupt:
            sys.stdout.write(" ...stopped")
        except (CommandError, httpx.HTTPError) as error:
            self._conversation.take_back()
            raise CommandError(str(error) or type(error).__name__) from None
        sys.stdout.write("\n")
        self._conversation.messages.append({"role": "assistant", "content": answer.text})
        self._tell(answer.summary())

    def _write(self, answer: Answer) -> None:
        for piece in self._stream(answer):
            sys.stdout.write(piece)
            sys.stdout.flush()

    def _stream(self, answer: Answer) -> Iterator[str]:
        """The answer to the conversation as it stands, piece by piece. Raises CommandError and httpx.HTTPError."""
        body = {
            "model": self._model,
            "messages": self._conversation.messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._sampling.body,
        }
        with self._client.stream("POST", "chat/completions", json=body) as response:
            if not response.is_success:
                response.read()
                check(response)
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if event.get("error"):
                    raise CommandError(str(event["error"].get("message", event["error"])))
                answer.num_tokens = (event.get("usage") or {}).get("completion_tokens", answer.num_tokens)
                for choice in event.get("choices") or ():
                    if piece := choice["delta"].get("content"):
                        answer.first = answer.first or time.monotonic()
                        answer.text += piece
                        yield piece

    def _add_files(self, paths: Sequence[str]) -> None:
        if not paths:
            raise CommandError("/audio needs the name of a file")
        for name in paths:
            path = Path(name)
            self._conversation.add_audio(read_clip(path), path.suffix.lstrip(".").lower() or "wav")

    def _add_microphone(self, arguments: Sequence[str]) -> None:
        try:
            seconds = float(arguments[0]) if arguments else None
        except ValueError:
            raise CommandError(f"/mic {arguments[0]}: that is no number of seconds") from None
        data, heard_s = record(seconds, self._tell)
        self._conversation.add_audio(data)
        self._tell(f"{heard_s:.1f} s; write a question, or /send")

    def _reset(self, _: Sequence[str]) -> None:
        self._conversation.reset()
        self._tell("the conversation begins anew")

    def _save(self, paths: Sequence[str]) -> None:
        if len(paths) != 1:
            raise CommandError("/save needs the name of a file")
        body = {"model": self._model, "messages": self._conversation.messages, **self._sampling.body}
        try:
            with Path(paths[0]).expanduser().open("x", encoding="utf-8") as file:
                json.dump(body, file, ensure_ascii=False, indent=1)
        except FileExistsError:
            raise CommandError(f"{paths[0]} exists: name another file") from None
        except OSError as error:
            raise CommandError(f"{paths[0]}: {error.strerror}") from None
        self._tell(f"{paths[0]} is the body of a request to chat/completions")

    def _tell(self, text: str, style: str = "dim") -> None:
        if text:
            self._console.print(text, style=style, markup=False)
