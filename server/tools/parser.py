"""Tool calls in the text of an answer, found while it is being written.

    text <tool_call> {"name": "f", "arguments": {...}} </tool_call> <tool_call> ...

That is how Qwen2 (and Hermes before it) writes calls. However the text is split over `feed`, the pieces joined are
the same. Text is held back only while it may be the beginning of a call, white space before the tag included: it
is the tag's. Nothing is lost: what turns out to be no call is text again.

A call is shown once it is whole and valid, since a piece of it could not be taken back. Where a grammar guarantees
that it will be (`is_eager`), its arguments are shown as they come. Time is linear in the text, however it is split.
Knows names, not schemas.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from enum import Enum, auto

from pydantic_core import from_json

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_HEADER = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"arguments"\s*:\s*(?=\{)')


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What one call grew by. The first delta of a call, and only it, has an id and a name."""

    index: int
    arguments: str = ""
    id: str = ""
    name: str = ""


@dataclass(slots=True)
class Parsed:
    """What may be shown."""

    text: str = ""
    calls: tuple[CallDelta, ...] = ()


def joined_calls(deltas: Iterable[CallDelta]) -> list[CallDelta]:
    """What each call grew by, in one piece."""
    calls: list[CallDelta] = []
    for delta in deltas:
        if not calls or calls[-1].index != delta.index:
            calls.append(delta)
        else:
            calls[-1] = replace(calls[-1], arguments=calls[-1].arguments + delta.arguments)
    return calls


class _State(Enum):
    TEXT = auto()
    BODY = auto()
    """Behind an opening tag."""
    CLOSING = auto()
    """Behind a call, where its closing tag belongs."""


class StreamingToolParser:
    """The calls of one answer."""

    def __init__(self, names: Collection[str], *, is_eager: bool = False, max_calls: int | None = None) -> None:
        """`names`: what may be called; anything else is text."""
        self._names = names
        self._is_eager = is_eager
        self._max_calls = max_calls
        self._state = _State.TEXT
        self._held = ""
        """Not yet decided: in TEXT, what may begin a call; in BODY, the body; in CLOSING, what may be the tag."""
        self._lead = ""
        """The opening tag of the body, with the white space before it."""
        self._scanner = JsonScanner()
        self._shown_to: int | None = None
        """Of the body's arguments; None: nothing of the call was shown."""
        self.num_calls = 0
        """Whose names were given out."""

    @property
    def is_done(self) -> bool:
        """Whether there are as many calls as there may be, all of them whole."""
        return self._state is not _State.BODY and self.num_calls == self._max_calls

    @property
    def is_cut(self) -> bool:
        """Whether a call was shown whose arguments are not whole."""
        return self._shown_to is not None and self._scanner.value_end is None

    def feed(self, text: str) -> Parsed:
        """Take a piece of the answer, give back what may be shown. What follows when `is_done` is dropped."""
        self._held += text
        parsed = Parsed()
        while not self.is_done and self._step(parsed):
            pass
        return parsed

    def finish(self) -> Parsed:
        """The answer has ended: what was held back and is no call is text."""
        follows_call = self._state is _State.TEXT and self.num_calls > 0 and not self._held.strip()
        if self.is_done or self._shown_to is not None or self._state is _State.CLOSING or follows_call:
            return Parsed()
        return Parsed(self._lead + self._held)

    def _step(self, parsed: Parsed) -> bool:
        """Decide on some of the held text. -> whether that was possible."""
        match self._state:
            case _State.TEXT:
                return self._step_text(parsed)
            case _State.BODY:
                return self._step_body(parsed)
            case _State.CLOSING:
                return self._step_closing()

    def _step_text(self, parsed: Parsed) -> bool:
        start = self._held.find(OPEN)
        if start < 0:
            num_shown = len(self._held) - self._num_uncertain()
            parsed.text += self._held[:num_shown]
            self._held = self._held[num_shown:]
            return False
        before = self._held[:start].rstrip()
        parsed.text += before
        self._lead = self._held[len(before) : start + len(OPEN)]
        self._begin(_State.BODY, self._held[start + len(OPEN) :])
        return True

    def _num_uncertain(self) -> int:
        """Length of the tail that is white space and the beginning of an opening tag, or one of them."""
        tag_length = next((n for n in range(len(OPEN) - 1, 0, -1) if self._held.endswith(OPEN[:n])), 0)
        before = self._held[: len(self._held) - tag_length]
        return len(self._held) - len(before.rstrip())

    def _step_body(self, parsed: Parsed) -> bool:
        self._scanner.scan(self._held)
        if self._is_eager:
            self._show_arguments(parsed)
        if (end := self._scanner.end) is None:
            if not self._scanner.is_broken:
                return False
            self._give_back(parsed, self._scanner.position)
        elif self._shown_to is not None:
            self._begin(_State.CLOSING, self._held[end:])
        elif (call := self._whole_call(self._held[:end])) is None:
            self._give_back(parsed, end)
        else:
            name, arguments = call
            parsed.calls += (self._new_call(name), CallDelta(self.num_calls - 1, arguments))
            self._begin(_State.CLOSING, self._held[end:])
        return True

    def _show_arguments(self, parsed: Parsed) -> None:
        if self._shown_to is None:
            header = _HEADER.match(self._held)
            if header is None or header.group(1) not in self._names:
                return
            parsed.calls += (self._new_call(header.group(1)),)
            self._shown_to = header.end()
        end = self._scanner.position if self._scanner.value_end is None else self._scanner.value_end
        if self._shown_to < end:
            parsed.calls += (CallDelta(self.num_calls - 1, self._held[self._shown_to : end]),)
            self._shown_to = end

    def _whole_call(self, body: str) -> tuple[str, str] | None:
        """Name and arguments, if this is a call of a known function."""
        try:
            call = from_json(body, allow_inf_nan=False)
            name, arguments = call["name"], call["arguments"]
        except (ValueError, KeyError):
            return None
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return None
        return name, json.dumps(arguments, ensure_ascii=False)

    def _new_call(self, name: str) -> CallDelta:
        self.num_calls += 1
        return CallDelta(self.num_calls - 1, id=f"call_{uuid.uuid4().hex[:24]}", name=name)

    def _give_back(self, parsed: Parsed, num_chars: int) -> None:
        """So much of the body was no call. White space at its end may be a next one's."""
        no_call = self._held[:num_chars].rstrip()
        if self._shown_to is None:
            parsed.text += self._lead + no_call
        self._begin(_State.TEXT, self._held[len(no_call) :])

    def _step_closing(self) -> bool:
        rest = self._held.lstrip()
        if len(rest) < len(CLOSE) and CLOSE.startswith(rest):
            return False
        self._begin(_State.TEXT, rest[len(CLOSE) :] if rest.startswith(CLOSE) else self._held)
        return True

    def _begin(self, state: _State, held: str) -> None:
        self._state, self._held = state, held
        if state is _State.BODY:
            self._scanner = JsonScanner()
        else:
            self._lead = ""
        self._shown_to = None


class JsonScanner:
    """Finds the end of a JSON object that arrives in pieces, from its brackets and quotes alone."""

    def __init__(self) -> None:
        self.position = 0
        """How much was read."""
        self.end: int | None = None
        """Behind the object, once it is closed."""
        self.value_end: int | None = None
        """Behind the first object or list inside it."""
        self.is_broken = False
        """What follows cannot be: something before the object, or a tag in it."""
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def scan(self, text: str) -> None:
        """Read on, to the end of the text or of the object. `text` is what it was at the last call, and more."""
        while self.position < len(text) and self.end is None:
            char = text[self.position]
            is_early = self._depth == 0 and char != "{" and not char.isspace()
            if is_early or (char == "<" and not self._in_string):
                self.is_broken = True
                return
            self.position += 1
            self._take(char)

    def _take(self, char: str) -> None:
        if self._in_string:
            self._in_string = self._is_escaped or char != '"'
            self._is_escaped = char == "\\" and not self._is_escaped
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            if self._depth == 0:
                self.end = self.position
            elif self._depth == 1 and self.value_end is None:
                self.value_end = self.position
