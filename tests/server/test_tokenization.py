"""/tokenize says what a request will read, and nothing runs on the engine for it; /detokenize is its inverse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Encoder

from .conftest import Served, Servers, audio_part, text_part, user
from .fake_engine import INFO


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
def test_a_conversation_costs_what_it_will(served: Served, path: str) -> None:
    messages = [user(audio_part(1.0), text_part("And?"), audio_part(0.5))]
    answer = served.post({"messages": messages}, path).json()
    assert not served.engine.requests
    usage = served.post({"messages": messages}).json()["usage"]
    assert answer["tokens"] == list(served.engine.requests[0].prompt_token_ids)
    assert answer["count"] == len(answer["tokens"]) == usage["prompt_tokens"]
    assert answer["audio_tokens"] == usage["prompt_tokens_details"]["audio_tokens"]
    clips = [clip.num_tokens for clip in served.engine.requests[0].clips]
    assert answer["audio_tokens_per_clip"] == clips == [25, 12]
    assert (answer["max_model_len"], answer["token_strs"]) == (256, None)


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "description": "ab"}}
SAID = [user("Hi"), {"role": "assistant", "content": [text_part("He"), text_part("llo")]}]
CALLED = [
    user("Hi"),
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a", "content": "1"},
]
TOLD = {"messages": CALLED, "tools": [TOOL]}
RENDERED: list[dict[str, Any]] = [
    {"messages": CALLED},
    TOLD,
    TOLD | {"tool_choice": "none"},
    TOLD | {"tool_choice": {"type": "function", "function": {"name": "f"}}},
    {"messages": SAID, "continue_final_message": True},
    {"messages": SAID, "add_generation_prompt": False},
]


@pytest.fixture(scope="module")
def roomy(servers: Servers) -> Served:
    """With room for a list of tools."""
    return servers.start(info=replace(INFO, max_model_len=4096))


@pytest.mark.parametrize("body", RENDERED, ids=str)
def test_what_renders_a_conversation_counts_too(roomy: Served, body: dict[str, Any]) -> None:
    roomy.engine.requests.clear()
    roomy.say("Yes.")
    answer = roomy.post(body, "/tokenize").json()
    assert roomy.post(body).status_code == 200
    (request,) = roomy.engine.requests
    assert answer["tokens"] == list(request.prompt_token_ids)


def test_a_raw_prompt(served: Served, encoder: Encoder) -> None:
    text = "<|im_start|>user\nhéllo<|im_end|>"
    answer = served.post({"prompt": text, "return_token_strs": True}, "/tokenize").json()
    assert answer["tokens"] == encoder.encode(text).ids
    assert answer["token_strs"][0] == "<|im_start|>"
    assert "".join(answer["token_strs"][1:5]).startswith("user\n")
    clip = {"prompt": "<|AUDIO|>", "audio": [audio_part(1.0)]}
    assert served.post(clip, "/tokenize").json()["count"] == 25


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=20))
def test_round_trip(served: Served, encoder: Encoder, text: str) -> None:
    tokens = served.post({"prompt": text}, "/tokenize").json()["tokens"]
    normalized = encoder.normalizer.normalize_str(text)
    assert served.post({"tokens": tokens}, "/detokenize").json() == {"prompt": normalized}


CHAT = {"messages": [user("Hi")]}
INVALID: dict[str, tuple[Any, str, str, str]] = {
    "neither": ({}, "/tokenize", "prompt", "missing_required_parameter"),
    "both": (CHAT | {"prompt": "Hi"}, "/tokenize", "prompt", "invalid_value"),
    "audio beside messages": (CHAT | {"audio": []}, "/tokenize", "audio", "invalid_value"),
    "no clip for the place": ({"prompt": "<|AUDIO|>"}, "/tokenize", "audio", "audio_count_mismatch"),
    "template": (CHAT | {"chat_template": "x"}, "/tokenize", "chat_template", "unsupported_parameter"),
    "a prompt with tools": ({"prompt": "Hi", "tools": [TOOL]}, "/tokenize", "tools", "unsupported_parameter"),
    "a prompt to go on with": ({"prompt": "Hi", "continue_final_message": True}, "/tokenize",
                               "continue_final_message", "unsupported_parameter"),
    "unknown tool": (TOLD | {"tool_choice": {"type": "function", "function": {"name": "g"}}}, "/tokenize",
                     "tool_choice.function.name", "invalid_value"),
    "nothing to go on with": (CHAT | {"continue_final_message": True}, "/tokenize",
                              "continue_final_message", "invalid_value"),
    "no call before": ({"messages": CALLED[2:]}, "/tokenize", "messages[0].tool_call_id", "invalid_value"),
    "too long": ({"prompt": "word " * 400}, "/tokenize", "prompt", "context_length_exceeded"),
    "much too long": ({"prompt": "word " * 150_000}, "/tokenize", "prompt", "context_length_exceeded"),
    "bad audio": ({"messages": [user({"type": "input_audio", "input_audio": {"data": "AAAA"}})]}, "/tokenize",
                  "messages[0].content[0]", "unsupported_audio"),
    "no tokens": ({}, "/detokenize", "tokens", "missing_required_parameter"),
    "text": ({"tokens": "Hi"}, "/detokenize", "tokens", "invalid_type"),
    "negative": ({"tokens": [-1]}, "/detokenize", "tokens[0]", "integer_below_min_value"),
    "past the vocabulary": ({"tokens": [600]}, "/detokenize", "tokens", "invalid_value"),
}  # fmt: skip


@pytest.mark.parametrize("name", INVALID)
def test_invalid_requests(served: Served, name: str) -> None:
    body, path, param, code = INVALID[name]
    response = served.post(body, path)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)


def test_unknown_models(served: Served) -> None:
    assert served.post(CHAT | {"model": "gpt-4o"}, "/tokenize").status_code == 404
    assert served.post({"tokens": [], "model": "gpt-4o"}, "/detokenize").status_code == 404
    assert served.post({"tokens": []}, "/v1/detokenize").json() == {"prompt": ""}


def test_everything_but_the_probes_is_guarded(servers: Servers) -> None:
    server = servers.start(api_key=("secret",))
    for path in ("/tokenize", "/detokenize", "/v1/files", "/v1/models", "/nothing", "/health/", "/openapi.json"):
        assert server.client.get(server.url + path).status_code == 401
    for path in ("/health", "/ready"):
        assert server.client.get(server.url + path).status_code == 200
    answer = server.post({"prompt": "Hi"}, "/tokenize", headers={"Authorization": "Bearer secret"})
    assert answer.status_code == 200
