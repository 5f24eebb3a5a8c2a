"""The bytes of streams, as OpenAI writes them."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx

from server.generation.channel import Channel

from .conftest import Served, user


def events(text: str) -> list[Any]:
    assert text.endswith("data: [DONE]\n\n")
    return [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]


def test_order_and_shape_of_chunks(served: Served) -> None:
    served.say("Hello there!", end=False)
    response = served.post({"messages": [user("Hi")], "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    first, *middle, last = events(response.text)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in (first, *middle))
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["choices"][0]["delta"]["content"]  # the last text rides on it
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in (*middle, last))
    assert text == "Hello there!"
    for chunk in (first, *middle, last):
        assert chunk["object"] == "chat.completion.chunk"
        assert chunk["id"] == first["id"]
        assert "usage" not in chunk


def test_usage_chunk(served: Served) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}
    *chunks, usage = events(served.post({"messages": [user("Hi")], **options}).text)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(served.engine.script.token_ids)


def test_characters_are_never_halved(served: Served) -> None:
    served.say("a🎉b\u2028c", end=False)
    body = served.post({"messages": [user("Hi")], "stream": True}).text
    assert body.isascii()
    contents = [chunk["choices"][0]["delta"].get("content", "") for chunk in events(body)]
    assert "".join(contents) == "a🎉b\u2028c"
    assert all("\ufffd" not in content for content in contents)


def test_logprobs_ride_on_their_text(served: Served) -> None:
    served.say("🎈 ok", end=False)
    body = served.post({"messages": [user("Hi")], "stream": True, "logprobs": True}).text
    tokens = []
    for chunk in events(body)[1:]:
        choice = chunk["choices"][0]
        tokens += choice["logprobs"]["content"]
        assert choice["delta"]["content"]
    assert len(tokens) == len(served.engine.script.token_ids)
    assert bytes(byte for token in tokens for byte in token["bytes"]).decode() == "🎈 ok"


def test_silence_is_filled_and_does_not_hold_back_the_headers(served: Served) -> None:
    served.say("ab cd", end=False, delay_s=2.0)  # the server's interval is 0.2 s
    started = time.monotonic()
    with httpx.stream(
        "POST", f"{served.url}/v1/chat/completions", json={"messages": [user("Hi")], "stream": True}, timeout=10
    ) as response:
        assert time.monotonic() - started < 1.8
        body = response.read().decode()
    assert ": keep-alive\n\n" in body
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in events(body)) == "ab cd"


def test_channel_closes_its_source_and_reports_its_failure() -> None:
    closed = []

    async def source(*, fails: bool):
        try:
            yield 1
            if fails:
                raise ValueError
            await asyncio.sleep(60)
        finally:
            closed.append(fails)

    async def scenario() -> None:
        waiting = Channel(source(fails=False))
        await waiting.wait_begun(1)
        assert await waiting.get(1) == 1
        await waiting.wait_begun(0.01)
        await waiting.aclose()
        failing = Channel(source(fails=True))
        assert await failing.get(1) == 1
        try:
            await failing.get(1)
        except ValueError:
            closed.append("told")

    asyncio.run(scenario())
    assert closed == [False, True, "told"]
