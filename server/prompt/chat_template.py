"""The checkpoint's own chat template: messages to the text that the model was trained on.

Rendered as transformers does it (sandboxed jinja, trimmed blocks). A checkpoint without a template gets the one
that transformers' processor has for Qwen2-Audio. What callers wrote is wrapped in marks before rendering and
cut out at them afterwards, so that the result still knows which of its text is whose.

Marks hold a nonce of this one rendering: no caller can write them. They are digits and brackets, which come through
whatever templates do to texts: JSON with or without escapes, Python's notation of lists, a change of case. White
space at the ends of a text stays outside, so that templates that trim find it; so do words inside the JSON of tools,
so that templates that compare find those.

A template may know tools itself. For one that does not, server/prompt/tools.py writes them into the turns.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import JsonValue

from model.config import read_json
from model.errors import ConfigError
from server.tools.plan import CalledFunction, Function

DEFAULT_TEMPLATE = """\
{% set audio_count = namespace(value=0) %}{% for message in messages %}\
{% if loop.first and message['role'] != 'system' %}\
<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}\
<|im_start|>{{ message['role'] }}\n\
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n\
{% else %}{% for content in message['content'] %}\
{% if 'audio' in content or 'audio_url' in content or message['type'] == 'audio' or content['type'] == 'audio' %}\
{% set audio_count.value = audio_count.value + 1 %}\
Audio {{ audio_count.value }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n\
{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"""

AUDIO = None
"""Stands for a clip among a turn's texts."""


_WORD = re.compile(r"[\w.-]*\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class Turn:
    """One message: a role of ours, and what the caller put in it, in order."""

    role: str
    content: str | tuple[str | None, ...]
    """A text, or texts and AUDIO marks."""
    calls: tuple[CalledFunction, ...] = ()
    """Of an assistant's turn."""
    call_id: str = ""
    """Of a tool's: the call that this is the result of."""


class PromptEnd(Enum):
    """Where a prompt ends."""

    ANSWER = auto()
    """Where a new answer begins."""
    MESSAGES = auto()
    """After the last message."""
    INSIDE = auto()
    """Inside the last message, which the answer continues."""


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of the rendered text, and whether it is the template's own."""

    text: str
    trusted: bool


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str, constants: dict[str, str] | None = None) -> None:
        """Compile `source`; it sees `constants` beside the messages. Raises ConfigError."""
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        try:
            self._template: Template = environment.from_string(source)
            variables = find_undeclared_variables(environment.parse(source))
        except TemplateError as error:
            raise ConfigError(f"the chat template cannot be compiled: {error}") from None
        self._constants = constants or {}
        self.has_tools = "tools" in variables
        """Whether the template writes tools, calls and results itself."""

    @classmethod
    def from_folder(cls, folder: Path) -> ChatTemplate:
        """Find the template where checkpoints keep it, or use the default. Raises ConfigError."""
        config = _read_if_there(folder / "tokenizer_config.json")
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        constants = {name: text for name in names if (text := _token_text(config.get(name)))}
        if (jinja := folder / "chat_template.jinja").exists():
            return cls(jinja.read_text(encoding="utf-8"), constants)
        for holder in (_read_if_there(folder / "chat_template.json"), config):
            if source := _default_source(holder.get("chat_template")):
                return cls(source, constants)
        return cls(DEFAULT_TEMPLATE, constants)

    def render(
        self, turns: Sequence[Turn], functions: Sequence[Function] = (), *, end: PromptEnd = PromptEnd.ANSWER
    ) -> list[Span]:
        """The prompt's text up to where the answer begins. Raises TemplateError when the template refuses.

        Only a template that has tools is given `functions`, calls and results.
        """
        assert self.has_tools or not functions, "nobody would see them"
        marks = _Marks()
        variables: dict[str, Any] = {"messages": [_message(turn, marks) for turn in turns]}
        if functions:
            variables["tools"] = marks.wrap_json([function.to_json() for function in functions])
        text = self._template.render(**variables, add_generation_prompt=end is PromptEnd.ANSWER, **self._constants)
        return marks.split(marks.cut(text, _last_text(turns[-1])) if end is PromptEnd.INSIDE else text)


class _Marks:
    """The marks of one rendering."""

    def __init__(self) -> None:
        nonce = str(secrets.randbits(128))
        self._open, self._close = f"[[{nonce}[", f"]{nonce}]]"

    def wrap(self, text: str) -> str:
        core = text.strip()
        if not core:
            return text
        start = text.index(core)
        return f"{text[:start]}{self._open}{core}{self._close}{text[start + len(core) :]}"

    def cut(self, text: str, final: str) -> str:
        """Drop what follows the final message's text, but for white space at its own end that the template kept."""
        end = text.rfind(self._close)
        core = final.strip()
        if not core or end < 0 or not text[:end].endswith(core):
            raise TemplateError("the final message cannot be continued: it has no text, or the template changes it")
        end += len(self._close)
        tail = final[len(final.rstrip()) :]
        return text[: end + len(tail)] if text.startswith(tail, end) else text[:end]

    def wrap_json(self, value: JsonValue) -> JsonValue:
        """Wrap every text, keys too, that is more than a word and so could be part of a control token."""
        match value:
            case str():
                return value if _WORD.match(value) else self.wrap(value)
            case list():
                return [self.wrap_json(item) for item in value]
            case dict():
                return {str(self.wrap_json(key)): self.wrap_json(item) for key, item in value.items()}
            case _:
                return value

    def split(self, text: str) -> list[Span]:
        """Cut at the marks. What a template did to unbalance them makes less trusted, never more."""
        first, *others = text.split(self._open)
        spans = [Span(first.replace(self._close, ""), trusted=self._close not in first)]
        for other in others:
            untrusted, closed, trusted = other.partition(self._close)
            spans.append(Span(untrusted, trusted=False))
            spans.append(Span(trusted.replace(self._close, ""), trusted=bool(closed) and self._close not in trusted))
        return [span for span in spans if span.text]


def _message(turn: Turn, marks: _Marks) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": _content(turn.content, marks)}
    if turn.calls:
        message["tool_calls"] = [
            {
                "type": "function",
                "id": marks.wrap(call.id),
                "function": marks.wrap_json({"name": call.name, "arguments": dict(call.arguments)}),
            }
            for call in turn.calls
        ]
    if turn.call_id:
        message["tool_call_id"] = marks.wrap(turn.call_id)
    return message


def _content(content: str | tuple[str | None, ...], marks: _Marks) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return marks.wrap(content)
    return [
        {"type": "audio", "audio_url": "audio"} if part is AUDIO else {"type": "text", "text": marks.wrap(part)}
        for part in content
    ]


def _last_text(turn: Turn) -> str:
    """The text at the end of a turn, with any blank parts behind it; none when it ends with a clip."""
    if isinstance(turn.content, str):
        return turn.content
    text = ""
    for part in reversed(turn.content):
        text = (part or "") + text
        if part is AUDIO or part.strip():
            break
    return text


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _default_source(templates: object) -> str:
    """A template, or a list of named ones, of which `default` is meant for chats."""
    if isinstance(templates, list):
        templates = next((entry.get("template") for entry in templates if entry.get("name") == "default"), "")
    return templates if isinstance(templates, str) else ""


def _token_text(token: object) -> str:
    """tokenizer_config.json writes a token as its text, or as an object that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)  # jinja's own filter escapes HTML


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
