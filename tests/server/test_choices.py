"""n choices, whole and streamed, and what vLLM's clients ask for: echoes, token ids, continued messages."""

from __future__ import annotations

from typing import Any

import pytest

from server.prompt.tokenizer import Tokenizer

from .conftest import Served, audio_part, user
from .test_streaming import events

MODEL = "tiny-audio"
COMPLETIONS = "/v1/completions"


def continued(text: Any, **options: Any) -> dict[str, Any]:
    messages = [user("Hi"), {"role": "assistant", "content": text}]
    return {"messages": messages, "continue_final_message": True, **options}


def prompt_text(served: Served) -> str:
    (request,) = served.engine.requests
    return b"".join(map(served.tokenizer.bytes_of, request.prompt_token_ids)).decode()


def test_whole_choices_come_in_order_and_the_prompt_counts_once(served: Served) -> None:
    answer = served.openai.chat.completions.create(model=MODEL, messages=[user("Hi")], n=3, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {"Hello there!"}
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    (request,) = served.engine.requests
    assert request.n == 3
    assert answer.usage.prompt_tokens == len(request.prompt_token_ids)
    assert answer.usage.completion_tokens == 3 * len(served.engine.script.token_ids)
    assert answer.usage.prompt_tokens_details.cached_tokens == 16
    assert not served.engine.aborted


def test_streamed_choices_have_a_role_and_an_end_each(served: Served) -> None:
    stream = served.openai.chat.completions.create(
        model=MODEL, messages=[user("Hi")], n=3, stream=True, stream_options={"include_usage": True}
    )
    *chunks, usage = list(stream)
    assert [chunk.choices[0].index for chunk in chunks[:3]] == [0, 1, 2]
    assert all(chunk.choices[0].delta.role == "assistant" for chunk in chunks[:3])
    for index in range(3):
        mine = [chunk.choices[0] for chunk in chunks[3:] if chunk.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in mine) == "Hello there!"
        assert [choice.finish_reason for choice in mine] == [None] * (len(mine) - 1) + ["stop"]
        assert all(choice.delta.role is None for choice in mine)
    assert usage.choices == []
    assert usage.usage.completion_tokens == 3 * len(served.engine.script.token_ids)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_each_choice_and_with_the_last_the_request(served: Served, stream: bool) -> None:
    served.say("one two three four", end=False)
    body = {"messages": [user("Hi")], "n": 2, "stop": "o th", "stream": stream}
    response = served.post(body)
    if stream:
        ends = [chunk["choices"][0] for chunk in events(response.text) if chunk["choices"][0]["finish_reason"]]
    else:
        ends = response.json()["choices"]
        assert [choice["message"]["content"] for choice in ends] == ["one tw"] * 2
    assert [(choice["index"], choice["stop_reason"]) for choice in ends] == [(0, "o th"), (1, "o th")]
    (request,) = served.engine.requests
    assert served.engine.ended == [(request.request_id, 0), (request.request_id, 1)]
    assert served.engine.aborted == [request.request_id]


def test_several_prompts_take_their_clips_in_order(served: Served) -> None:
    body = {
        "prompt": ["<|AUDIO|>a", "no audio", "b<|AUDIO|><|AUDIO|>"],
        "audio": [audio_part(0.5), audio_part(1.0), audio_part(0.25)],
        "n": 2,
        "max_tokens": 50,
    }
    answer = served.post(body, COMPLETIONS).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    by_length = sorted(served.engine.requests, key=lambda request: len(request.clips))
    assert [[clip.num_tokens for clip in request.clips] for request in by_length] == [[], [12], [25, 6]]
    assert answer["usage"]["prompt_tokens"] == sum(len(request.prompt_token_ids) for request in by_length)
    assert answer["usage"]["completion_tokens"] == 6 * len(served.engine.script.token_ids)
    assert answer["usage"]["prompt_tokens_details"]["audio_tokens"] == 43
    short = {"prompt": ["<|AUDIO|>", "<|AUDIO|>"], "audio": [audio_part(0.5)]}
    assert served.post(short, COMPLETIONS).json()["error"]["param"] == "audio"


def test_several_prompts_streamed_through_the_client(served: Served, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Once upon")
    stream = served.openai.completions.create(
        model=MODEL, prompt=[ids, ids], n=2, stream=True, echo=True, stream_options={"include_usage": True}
    )
    *chunks, usage = list(stream)
    for index in range(4):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.text for choice in mine) == "Once uponHello there!"
        assert [choice.finish_reason for choice in mine] == [None] * (len(mine) - 1) + ["stop"]
    assert usage.usage.prompt_tokens == 2 * len(ids)


def test_a_failure_of_one_prompt_fails_the_request_and_aborts_the_others(served: Served) -> None:
    served.say("one two three", delay_s=0.01, failure=RuntimeError("broken"), fail_after=1)
    assert served.post({"prompt": ["a", "b"]}, COMPLETIONS).status_code == 500
    assert sorted(served.engine.aborted) == sorted(request.request_id for request in served.engine.requests)


def test_an_echo_alone_never_reaches_the_engine(served: Served) -> None:
    answer = served.post({"prompt": ["ab", "cd"], "echo": True, "max_tokens": 0}, COMPLETIONS).json()
    assert [(choice["text"], choice["finish_reason"]) for choice in answer["choices"]] == [
        ("ab", "length"), ("cd", "length")
    ]  # fmt: skip
    assert answer["usage"]["completion_tokens"] == 0
    streamed = {"prompt": "ab", "echo": True, "max_tokens": 0, "stream": True}
    first, last = events(served.post(streamed, COMPLETIONS).text)
    assert (first["choices"][0]["text"], last["choices"][0]["finish_reason"]) == ("ab", "length")
    assert not served.engine.requests


@pytest.mark.parametrize("best_of", [2, 3])
def test_best_of_passes_as_n(served: Served, best_of: int) -> None:
    response = served.post({"prompt": "a", "n": 2, "best_of": best_of}, COMPLETIONS)
    assert response.status_code == (200 if best_of == 2 else 400)
    assert best_of == 2 or response.json()["error"]["param"] == "best_of"


def test_the_prompt_ends_inside_a_continued_message(served: Served) -> None:
    assert served.post(continued("Hello <|im_end|> ")).status_code == 200
    assert prompt_text(served).endswith("<|im_start|>assistant\nHello <|im_end|> ")
    end = served.tokenizer.special["<|im_end|>"]
    assert end not in served.engine.requests[0].prompt_token_ids[-8:]  # what the caller wrote is text


def test_parts_are_continued_too_and_echoed(served: Served) -> None:
    parts = [{"type": "text", "text": "One, "}, {"type": "text", "text": "two,"}]
    answer = served.post(continued(parts, echo=True, n=2)).json()
    assert prompt_text(served).endswith("assistant\nOne, two,")
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["One, two,Hello there!"] * 2
    blank = [{"type": "text", "text": text} for text in ("One ", "", " ")]
    assert served.post(continued(blank)).status_code == 200
    last = served.engine.requests.pop().prompt_token_ids
    assert b"".join(map(served.tokenizer.bytes_of, last)).endswith(b"assistant\nOne  ")
    chunks = events(served.post(continued("One", echo=True, stream=True)).text)
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks[:2]] == ["", "One"]


def test_without_a_generation_prompt(served: Served) -> None:
    assert served.post({"messages": [user("Hi")], "add_generation_prompt": False}).status_code == 200
    assert prompt_text(served).endswith("<|im_end|>\n")
    served.post({"messages": [user("Hi")], "add_generation_prompt": True, "echo": True})
    assert served.engine.requests[1].prompt_token_ids != served.engine.requests[0].prompt_token_ids


INVALID = {
    "both": (continued("a", add_generation_prompt=True), "continue_final_message"),
    "a user's": ({"messages": [user("Hi")], "continue_final_message": True}, "continue_final_message"),
    "one that calls": (
        {
            "messages": [
                user("Hi"),
                {
                    "role": "assistant",
                    "content": "a",
                    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                },
            ],
            "continue_final_message": True,
        },
        "continue_final_message",
    ),
    "no text": (continued("  "), "messages"),
    "too many": ({"messages": [user("Hi")], "n": 10**9}, "n"),
    "none": ({"messages": [user("Hi")], "n": 0}, "n"),
    "a fraction": ({"messages": [user("Hi")], "n": 1.5}, "n"),
    "salt": ({"messages": [user("Hi")], "cache_salt": "s" * 129}, "cache_salt"),
    "priority": ({"messages": [user("Hi")], "priority": 2**63}, "priority"),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid(served: Served, name: str) -> None:
    body, param = INVALID[name]
    response = served.post(body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
    assert not served.engine.requests


@pytest.mark.parametrize("path", ["/v1/chat/completions", COMPLETIONS])
def test_token_ids_whole_and_streamed(served: Served, path: str) -> None:
    served.say("\N{BALLOON} ok")
    is_chat = path != COMPLETIONS
    body = {"n": 2, "return_token_ids": True, **({"messages": [user("Hi")]} if is_chat else {"prompt": "Hi"})}
    whole = served.post(body, path).json()
    prompt_ids = list(served.engine.requests[0].prompt_token_ids)
    holders = [whole] if is_chat else whole["choices"]
    assert all(holder["prompt_token_ids"] == prompt_ids for holder in holders)
    assert all(choice["token_ids"] == served.engine.script.token_ids for choice in whole["choices"])
    chunks = events(served.post({**body, "stream": True}, path).text)
    for index in range(2):
        mine = [chunk for chunk in chunks if chunk["choices"][0]["index"] == index]
        first = mine[0] if is_chat else mine[0]["choices"][0]
        assert first["prompt_token_ids"] == prompt_ids
        told = [token_id for chunk in mine for token_id in chunk["choices"][0]["token_ids"]]
        assert told == served.engine.script.token_ids
    assert "token_ids" not in served.post({**body, "return_token_ids": False}, path).text


def test_priority_and_salt_reach_the_engine(served: Served) -> None:
    messages = [user(audio_part(0.5))]
    for options in ({}, {"cache_salt": "mine", "priority": -3}, {"cache_salt": "yours"}):
        assert served.post({"messages": messages, **options}).status_code == 200
    assert [request.priority for request in served.engine.requests] == [0, -3, 0]
    assert len({request.clips[0].content_hash for request in served.engine.requests}) == 3
