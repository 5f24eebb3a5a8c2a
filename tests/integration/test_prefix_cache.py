"""The prefix cache over HTTP: every endpoint says what was cached, streaming or not, and answers are the same."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from tests.integration.conftest import ROOT, ServerProcess, input_audio, start_server, text

SPEECH = ROOT / "tests" / "fixtures" / "speech"
DIGITS = input_audio((SPEECH / "digits_four_two_seven.wav").read_bytes())
SIREN = input_audio((SPEECH / "sound_siren.wav").read_bytes())
QUESTION = "What does the person say?"


@pytest.fixture(scope="module")
def plain_server() -> Iterator[ServerProcess]:
    server = start_server("--no-enable-prefix-caching")
    yield server
    server.stop()


@pytest.fixture
def salt() -> str:
    """What other tests have asked must not be found here."""
    return uuid.uuid4().hex


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def chat(server: ServerProcess, messages: list[Any], *, stream: bool = False, **more: Any) -> tuple[str, int, int]:
    """-> answer, tokens of the prompt, those that were cached."""
    create = server.openai.chat.completions.create
    model = "tympan-tiny"
    if not stream:
        whole = create(model=model, messages=messages, temperature=0, extra_body=more)
        answer, usage = whole.choices[0].message.content, whole.usage
    else:
        chunks = list(
            create(
                model=model, messages=messages, temperature=0, extra_body=more, stream=True,
                stream_options={"include_usage": True},
            )
        )  # fmt: skip
        answer = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    return answer or "", usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens or 0


def converse(server: ServerProcess, **more: Any) -> list[tuple[str, int, int]]:
    """Three turns; two clips."""
    messages: list[Any] = []
    given = []
    for question in (
        user(DIGITS, text(QUESTION)),
        user(text("What does the person say? Please answer again.")),
        user(SIREN, text("What's that sound?")),
    ):
        messages.append(question)
        given.append(chat(server, messages, **more))
        messages.append({"role": "assistant", "content": given[-1][0]})
    return given


@pytest.mark.parametrize("stream", [False, True])
def test_later_turns_compute_only_what_is_new(
    bundled_server: ServerProcess, plain_server: ServerProcess, salt: str, stream: bool
) -> None:
    plain = converse(plain_server, stream=stream)
    cached = converse(bundled_server, stream=stream, cache_salt=salt)
    assert [turn[:2] for turn in cached] == [turn[:2] for turn in plain]
    assert [turn[2] for turn in plain] == [0, 0, 0]
    assert cached[0][2] == 0
    for before, turn in pairwise(cached):
        assert before[1] - 16 <= turn[2] < turn[1]
    again = converse(bundled_server, stream=stream, cache_salt=salt)
    assert [turn[0] for turn in again] == [turn[0] for turn in plain]
    assert all(turn[1] - 16 <= turn[2] < turn[1] for turn in again)


def test_another_salt_or_another_clip_finds_nothing_of_it(bundled_server: ServerProcess, salt: str) -> None:
    asked = [user(DIGITS, text(QUESTION))]
    _, length, _ = chat(bundled_server, asked, cache_salt=salt)
    assert chat(bundled_server, asked, cache_salt=salt)[2] >= length - 16
    assert chat(bundled_server, asked, cache_salt=salt + "x")[2] == 0
    other = [user(SIREN, text(QUESTION))]
    assert chat(bundled_server, other, cache_salt=salt)[2] < 48  # the template's words before the clip


def test_several_choices_count_their_prompt_once(bundled_server: ServerProcess, salt: str) -> None:
    asked = [user(DIGITS, text(QUESTION))]
    _, length, cached = chat(bundled_server, asked, n=4, cache_salt=salt)
    assert cached == 0
    assert length - 16 <= chat(bundled_server, asked, n=4, cache_salt=salt)[2] < length


@pytest.mark.parametrize("stream", [False, True])
def test_completions_and_responses_say_what_was_cached(
    bundled_server: ServerProcess, salt: str, stream: bool
) -> None:
    body: dict[str, Any] = {"model": "tympan-tiny", "prompt": f"{salt} " * 8, "max_tokens": 2, "temperature": 0}
    spoken = {"model": "tympan-tiny", "input": f"{salt} " * 9, "max_output_tokens": 16, "temperature": 0}
    client = bundled_server.openai
    for is_second in (False, True):
        if stream:
            options = {"include_usage": True}
            usage = list(client.completions.create(**body, stream=True, stream_options=options))[-1].usage
            response = list(client.responses.create(**spoken, stream=True))[-1].response  # type: ignore[call-overload]
        else:
            usage = client.completions.create(**body).usage
            response = client.responses.create(**spoken)  # type: ignore[call-overload]
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        for cached, length in (
            (usage.prompt_tokens_details.cached_tokens, usage.prompt_tokens),
            (response.usage.input_tokens_details.cached_tokens, response.usage.input_tokens),
        ):
            if is_second:
                assert length - 16 <= cached < length
            else:
                assert cached < 48 < length
