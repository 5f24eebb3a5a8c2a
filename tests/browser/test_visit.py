"""What a page does about keys, failures and slow answers, against a scripted engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.errors import EngineDeadError
from tests.server.conftest import Servers

from .conftest import SPOKEN, Visitor

pytestmark = pytest.mark.browser


def test_an_answer_can_be_stopped(servers: Servers, visit: Callable[..., Visitor]) -> None:
    """By Escape and by the button; the engine hears of it, and what was said stays said."""
    server = servers.start()
    server.say("Hello there! " * 40, delay_s=0.05)
    visitor = visit(server.url)
    page = visitor.page
    question = page.get_by_label("Question, if you have one")
    for number, stop in enumerate((lambda: page.keyboard.press("Escape"), lambda: visitor.button("Stop").click())):
        question.fill("Talk!")
        page.keyboard.press("Enter")
        page.locator(".answer").nth(number).get_by_text("Hello").wait_for()
        stop()
        page.locator(".answer").nth(number).get_by_text("Stopped.").wait_for()
        assert visitor.button("Send").is_visible()
    for _ in range(100):
        if len(server.engine.aborted) == 2:
            break
        page.wait_for_timeout(50)
    assert len(server.engine.aborted) == 2
    said = page.locator(".answer .said").first.inner_text()
    assert visitor.bodies[1]["messages"][1] == {"role": "assistant", "content": said}


def test_a_key_is_asked_for_and_forgotten(servers: Servers, visit: Callable[..., Visitor]) -> None:
    server = servers.start(api_key=("right",))
    server.say("Hello there!")
    visitor = visit(server.url, "401 (Unauthorized)")
    page = visitor.page
    page.get_by_text("You didn't provide an API key.").wait_for()
    for key, answer in (("wrong", "Incorrect API key provided."), ("right", "tiny-audio")):
        page.locator("#key").fill(key)
        visitor.button("Use it").click()
        page.get_by_text(answer).first.wait_for()
    assert page.locator("#key").is_hidden()
    assert visitor.ask("Hi") == "Hello there!"
    assert page.evaluate("() => JSON.stringify({...localStorage})").find("right") == -1
    assert "right" in page.evaluate("() => JSON.stringify({...sessionStorage})")
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('forbidden')); }")
    visitor.button("Copy as curl").click()
    page.get_by_role("dialog").wait_for()
    code = page.get_by_label("Code of this request").input_value()
    assert "$OPENAI_API_KEY" in code
    assert "right" not in code


def test_failures_are_told_in_the_server_s_words(
    servers: Servers, visit: Callable[..., Visitor], tmp_path: Path
) -> None:
    """And are no part of the conversation."""
    server = servers.start()
    server.say("Hello there!")
    visitor = visit(server.url, "Failed to load resource")
    page = visitor.page
    noise = tmp_path / "noise.wav"
    noise.write_bytes(b"this is no sound at all" * 50)
    page.locator("#files").set_input_files(noise)
    page.get_by_text("This browser cannot play it").wait_for()
    visitor.ask("What is it?")
    told = page.locator(".answer .error").inner_text()
    assert "messages[0].content[0]" in told
    visitor.button("Edit").click()
    visitor.button("Remove noise.wav").click()
    assert page.get_by_label("Question, if you have one").input_value() == "What is it?"
    visitor.add(SPOKEN)
    assert visitor.ask("Now?") == "Hello there!"
    assert len(visitor.bodies[-1]["messages"]) == 1
    server.say("Hello there!", failure=EngineDeadError("gone"), fail_after=1)
    visitor.ask("And now?")
    page.get_by_text("The engine is not available.").wait_for()
    server.say("Hello there!")
    visitor.button("Try again").click()
    page.locator(".answer").nth(1).get_by_text("Hello there!").wait_for()
    assert [message["role"] for message in visitor.bodies[-1]["messages"]] == ["user", "assistant", "user"]
