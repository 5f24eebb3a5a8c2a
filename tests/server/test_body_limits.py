"""Bodies made to cost: each is refused by name, soon, in little memory, and never repeated in the answer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from server.api.tokenization import MAX_TOKENS
from server.http.json_body import MAX_JSON_OBJECTS, MAX_JSON_VALUES

from .conftest import Served, Servers, text_part, user

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES = [user("Hi")]


def chat(**more: Any) -> bytes:
    return json.dumps({"messages": MESSAGES, **more}).encode()


def said(text: str) -> bytes:
    return json.dumps({"messages": [user(text)]}).encode()


def nested(depth: int) -> bytes:
    return chat()[:-1] + b', "x": ' + b"[" * depth + b"]" * depth + b"}"


HOSTILE: dict[str, tuple[str, Callable[[], bytes], int, str | None]] = {
    "open arrays": (CHAT, lambda: b'{"messages": ' + b"[" * 200_000, 400, "json_too_deep"),
    "open objects": (CHAT, lambda: b'{"a":' * 40_000, 400, "json_too_deep"),
    "closed arrays": (CHAT, lambda: nested(300), 400, "json_too_deep"),
    "too many values": (CHAT, lambda: chat(x=[0] * MAX_JSON_VALUES), 413, "request_too_large"),
    "too many arrays": (CHAT, lambda: chat(x=[[]] * MAX_JSON_VALUES), 413, "request_too_large"),
    "too many objects": (CHAT, lambda: chat(x=[{}] * MAX_JSON_OBJECTS), 413, "request_too_large"),
    "bad parts": (
        CHAT,
        lambda: json.dumps({"messages": [user(*[{"type": "z"}] * 4000)] * 10}).encode(),
        400,
        "invalid_value",
    ),
    "bad items": (RESPONSES, lambda: json.dumps({"input": [{"type": "z"}] * 4000}).encode(), 400, "invalid_value"),
    "messages": (CHAT, lambda: json.dumps({"messages": MESSAGES * 5000}).encode(), 400, "array_above_max_length"),
    "parts": (
        CHAT,
        lambda: json.dumps({"messages": [user(*[text_part("x")] * 5000)]}).encode(),
        400,
        "array_above_max_length",
    ),
    "stop": (CHAT, lambda: chat(stop=["x"] * 5), 400, "array_above_max_length"),
    "long stop": (CHAT, lambda: chat(stop="x" * 1025), 400, "string_above_max_length"),
    "n": (CHAT, lambda: chat(n=10**9), 400, "integer_above_max_value"),
    "n of prompts": (
        COMPLETIONS,
        lambda: json.dumps({"prompt": ["Hi"] * 100, "n": 100}).encode(),
        400,
        "invalid_value",
    ),
    "tools": (
        CHAT,
        lambda: chat(tools=[{"type": "function", "function": {"name": "f"}}] * 129),
        400,
        "array_above_max_length",
    ),
    "bias": (CHAT, lambda: chat(logit_bias={str(k): 1 for k in range(5000)}), 400, "array_above_max_length"),
    "digits": (CHAT, lambda: chat()[:-1] + b', "seed": ' + b"9" * (1 << 19) + b"}", 400, None),
    "text": (
        CHAT,
        lambda: json.dumps({"messages": [user("word " * 180_000)]}).encode(),
        400,
        "context_length_exceeded",
    ),
    "letters": (
        CHAT,
        lambda: json.dumps({"messages": [user("x" * 900_000)]}).encode(),
        400,
        "context_length_exceeded",
    ),
    "placeholders": (
        COMPLETIONS,
        lambda: json.dumps({"prompt": "<|AUDIO|>" * 100_000}).encode(),
        400,
        None,
    ),
    "clips": (
        CHAT,
        lambda: json.dumps(
            {"messages": [user(*[{"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}}] * 17)]}
        ).encode(),
        400,
        "too_many_audio_clips",
    ),
    "no text": (CHAT, lambda: b"\xff\xfe" * 1000, 400, None),
    "surrogates": (CHAT, lambda: b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, None),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies(served: Served, name: str) -> None:
    path, make, status, code = HOSTILE[name]
    body = make()
    started = time.monotonic()
    response = served.post(body, path)
    assert time.monotonic() - started < 10
    error = response.json()["error"]
    assert response.status_code == status, error
    if code:
        assert error["code"] == code
    assert len(response.content) < 1000
    assert not served.engine.requests


def test_what_is_within_the_limits_passes(servers: Servers, served: Served) -> None:
    assert served.post(nested(190)).status_code == 200
    large = servers.start(max_body_mb=4)
    response = large.post({"tokens": [1] * MAX_TOKENS}, "/detokenize")
    assert response.status_code == 200
