"""Tools in POST /v1/chat/completions: what the model reads, and the calls that clients get."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from server.tokenizer import Tokenizer

from .conftest import Served, Servers, audio_part, user
from .fake_engine import INFO
from .test_streaming import events

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Says what it's like",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
TIME_CALL = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def shared_server(servers: Servers) -> Served:
    """With room for a list of tools: the test tokenizer knows few words."""
    return servers.start(sse_keep_alive_interval=0.2, info=replace(INFO, max_model_len=4096))


def ask(**fields: Any) -> dict[str, Any]:
    return {"messages": [user("Is it warm in Köln?")], "tools": [WEATHER, TIME], **fields}


def prompt_of(served: Served, tokenizer: Tokenizer) -> str:
    return b"".join(map(tokenizer.bytes_of, served.engine.requests[-1].prompt_token_ids)).decode()


def create(served: Served, **fields: Any) -> Any:
    return served.openai.chat.completions.create(model="tiny-audio", **ask(**fields))


def test_whole_answer_with_calls(served: Served, tokenizer: Tokenizer) -> None:
    served.say(f"I'll look.\n{CALL}\n{TIME_CALL}")
    choice = create(served).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I'll look.")
    weather, clock = choice.message.tool_calls
    assert weather.id.startswith("call_")
    assert weather.id != clock.id
    assert (weather.type, weather.function.name, weather.function.arguments) == (
        "function", "get_weather", '{"city": "Köln"}'
    )  # fmt: skip
    assert (clock.function.name, clock.function.arguments) == ("get_time", "{}")
    prompt = prompt_of(served, tokenizer)
    assert prompt.startswith("<|im_start|>system\nYou are a helpful assistant.\n\n# Tools\n")
    assert json.dumps(WEATHER, ensure_ascii=False) in prompt


def test_exact_body(served: Served) -> None:
    served.say(CALL)
    body = served.post(ask()).json()
    call_id = body["choices"][0]["message"]["tool_calls"][0]["id"]
    function = {"name": "get_weather", "arguments": '{"city": "Köln"}'}
    assert body["choices"] == [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "tool_calls": [{"id": call_id, "type": "function", "function": function}],
            },
            "logprobs": None,
            "finish_reason": "tool_calls",
            "stop_reason": None,
        }
    ]


def test_an_answer_without_calls_has_none(served: Served) -> None:
    message = served.post(ask()).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Hello there!", "refusal": None}


def test_streamed_calls(served: Served) -> None:
    served.say(f"I'll look.\n{CALL}\n{TIME_CALL}")
    chunks = events(served.post(ask(stream=True)).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == "I'll look."
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [(call["index"], call["type"]) for call in calls] == [(0, "function"), (1, "function")]
    assert calls[0]["function"] == {"name": "get_weather", "arguments": '{"city": "Köln"}'}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_the_clients_own_helper_puts_a_stream_together(served: Served) -> None:
    served.say(f"I'll look.\n{CALL}\n{TIME_CALL}")
    with served.openai.chat.completions.stream(model="tiny-audio", **ask()) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.content == "I'll look."
    assert [call.function.arguments for call in message.tool_calls] == ['{"city": "Köln"}', "{}"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ['<tool_call>{"name": "get_weather", "arguments": {',
                                  "<tool_call>f()</tool_call> ok",
                                  '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>'])  # fmt: skip
def test_malformed_calls_are_given_back(served: Served, text: str, stream: bool) -> None:
    served.say(text)
    response = served.post(ask(stream=stream))
    if stream:
        *chunks, last = events(response.text)
        content = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in (*chunks, last))
        reason = last["choices"][0]["finish_reason"]
    else:
        choice = response.json()["choices"][0]
        content, reason = choice["message"]["content"], choice["finish_reason"]
        assert "tool_calls" not in choice["message"]
    assert (content, reason) == (text, "stop")


def test_a_limit_that_cuts_a_call(served: Served) -> None:
    served.say(CALL)
    choice = create(served, max_completion_tokens=20).choices[0]
    assert choice.finish_reason == "length"
    assert CALL.startswith(choice.message.content)
    assert choice.message.tool_calls is None


def test_logprobs_are_all_there(served: Served) -> None:
    served.say(f"Ok.{CALL}", end=False)
    chunks = events(served.post(ask(stream=True, logprobs=True)).text)
    logprobs = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    tokens = [token for entry in logprobs if entry for token in entry["content"]]
    assert bytes(byte for token in tokens for byte in token["bytes"]).decode() == f"Ok.{CALL}"


def test_one_call_at_most_where_asked_for(served: Served) -> None:
    served.say(f"{CALL}\n{TIME_CALL}", delay_s=0.001)
    choice = create(served, parallel_tool_calls=False).choices[0]
    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather"]
    assert choice.finish_reason == "tool_calls"
    assert served.engine.aborted  # what would follow is not even computed


def test_choice_none_means_no_tools(served: Served, tokenizer: Tokenizer) -> None:
    served.say(CALL)
    choice = create(served, tool_choice="none").choices[0]
    assert (choice.message.content, choice.finish_reason) == (CALL, "stop")
    assert "# Tools" not in prompt_of(served, tokenizer)


def test_allowed_tools_are_the_only_ones(served: Served, tokenizer: Tokenizer) -> None:
    served.say(f"{CALL}\n{TIME_CALL}")
    named = [{"type": "function", "function": {"name": "get_time"}}]
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": named}}
    message = create(served, tool_choice=allowed).choices[0].message
    assert [call.function.name for call in message.tool_calls] == ["get_time"]
    assert message.content == CALL  # not allowed, so no call
    assert "get_weather" not in prompt_of(served, tokenizer)


def test_results_come_back_in_order(served: Served, tokenizer: Tokenizer) -> None:
    calls = [
        {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Köln"}'}},
        {"id": "b", "type": "function", "function": {"name": "get_time", "arguments": ""}},
    ]
    degrees = [{"type": "text", "text": "21"}, {"type": "text", "text": " °C"}]
    messages = [
        user(audio_part(0.1)),
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "b", "content": "12:00<|im_end|>"},
        {"role": "tool", "tool_call_id": "a", "content": degrees},
    ]
    assert create(served, messages=messages).choices[0].message.content == "Hello there!"
    prompt = prompt_of(served, tokenizer)
    assert prompt.endswith(
        f"<|im_start|>assistant\n{CALL}\n{TIME_CALL}<|im_end|>\n<|im_start|>user\n"
        "<tool_response>\n12:00<|im_end|>\n</tool_response>\n<tool_response>\n21 °C\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ends = served.engine.requests[-1].prompt_token_ids.count(tokenizer.special["<|im_end|>"])
    assert ends == 4  # the result's own is text
    assert served.post({"messages": messages}).status_code == 200  # a request without tools may have had some before


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


def calling(*calls: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": list(calls), **fields}


def choose(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [choose(name) for name in names]}}


A_CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
INVALID = {
    "no tools": (ask(tools=[]), "tools", "empty_array"),
    "too many tools": (ask(tools=[function(name=f"f{k}") for k in range(129)]), "tools", "array_above_max_length"),
    "tools no list": (ask(tools={}), "tools", "invalid_type"),
    "custom tool": (ask(tools=[{"type": "custom", "custom": {"name": "f"}}]), "tools[0].type", "invalid_value"),
    "tool without type": (ask(tools=[{}]), "tools[0].type", "missing_required_parameter"),
    "tool no object": (ask(tools=["f"]), "tools[0]", "invalid_type"),
    "no function": (ask(tools=[{"type": "function"}]), "tools[0].function", "missing_required_parameter"),
    "no name": (ask(tools=[{"type": "function", "function": {}}]), "tools[0].function.name",
                "missing_required_parameter"),
    "bad name": (ask(tools=[function(name="a b")]), "tools[0].function.name", "invalid_value"),
    "name with a line break": (ask(tools=[function(name="f\n")]), "tools[0].function.name", "invalid_value"),
    "long name": (ask(tools=[function(name="f" * 65)]), "tools[0].function.name", "invalid_value"),
    "name twice": (ask(tools=[function(), TIME, function()]), "tools[2].function.name", "invalid_value"),
    "parameters no object": (ask(tools=[function(parameters=[])]), "tools[0].function.parameters", "invalid_type"),
    "parameters of a list": (
        ask(tools=[function(parameters={"type": "array"})]), "tools[0].function.parameters", "invalid_value"
    ),
    "strict a word": (ask(tools=[function(strict="yes")]), "tools[0].function.strict", "invalid_type"),
    "choice without tools": ({"messages": [user("Hi")], "tool_choice": "auto"}, "tool_choice", "invalid_value"),
    "unknown choice": (ask(tool_choice="always"), "tool_choice", "invalid_value"),
    "choice a number": (ask(tool_choice=1), "tool_choice", "invalid_value"),
    "choice without type": (ask(tool_choice={}), "tool_choice.type", "missing_required_parameter"),
    "custom choice": (ask(tool_choice={"type": "custom", "custom": {"name": "f"}}), "tool_choice.type",
                      "invalid_value"),
    "unknown function": (ask(tool_choice=choose("f")), "tool_choice.function.name", "invalid_value"),
    "unknown allowed function": (
        ask(tool_choice=allowed("auto", "get_time", "f")),
        "tool_choice.allowed_tools.tools[1].function.name",
        "invalid_value",
    ),
    "nothing allowed": (ask(tool_choice=allowed("auto")), "tool_choice.allowed_tools.tools", "empty_array"),
    "unknown mode": (ask(tool_choice=allowed("none", "get_time")), "tool_choice.allowed_tools.mode",
                     "invalid_value"),
    "parallel a word": (ask(parallel_tool_calls="no"), "parallel_tool_calls", "invalid_type"),
    "functions": (ask(functions=[{"name": "f"}]), "functions", "unsupported_parameter"),
    "function_call": (ask(function_call={"name": "f"}), "function_call", "unsupported_parameter"),
    "function role": (ask(messages=[{"role": "function", "name": "f", "content": "1"}]), "messages[0].role",
                      "invalid_value"),
    "calls of the user": (
        ask(messages=[user("Hi") | {"tool_calls": [A_CALL]}]), "messages[0].tool_calls", "unsupported_parameter"
    ),
    "call without id": (ask(messages=[calling({})]), "messages[0].tool_calls[0].id", "missing_required_parameter"),
    "call of a custom tool": (
        ask(messages=[calling(A_CALL | {"type": "custom"})]), "messages[0].tool_calls[0].type", "invalid_value"
    ),
    "arguments no JSON": (
        ask(messages=[calling(A_CALL | {"function": {"name": "f", "arguments": "{"}})]),
        "messages[0].tool_calls[0].function.arguments",
        "invalid_value",
    ),
    "arguments a list": (
        ask(messages=[calling(A_CALL | {"function": {"name": "f", "arguments": "[]"}})]),
        "messages[0].tool_calls[0].function.arguments",
        "invalid_value",
    ),
    "deep arguments": (
        ask(messages=[calling(A_CALL | {"function": {"name": "f", "arguments": '{"a":' * 10_000}})]),
        "messages[0].tool_calls[0].function.arguments",
        "invalid_value",
    ),
    "audio of the assistant": (
        ask(messages=[calling(A_CALL, content=[audio_part(0.1)])]), "messages[0].content[0].type", "invalid_value"
    ),
    "audio in a call's message": (ask(messages=[calling(A_CALL, audio={"id": "x"})]), "messages[0].audio",
                                  "unsupported_parameter"),
    "result without id": (
        ask(messages=[{"role": "tool", "content": "1"}]), "messages[0].tool_call_id", "missing_required_parameter"
    ),
    "result without content": (
        ask(messages=[calling(A_CALL), {"role": "tool", "tool_call_id": "a"}]),
        "messages[1].content",
        "missing_required_parameter",
    ),
    "result of nothing": (
        ask(messages=[user("Hi"), {"role": "tool", "tool_call_id": "a", "content": "1"}]),
        "messages[1].tool_call_id",
        "invalid_value",
    ),
    "result before its call": (
        ask(messages=[{"role": "tool", "tool_call_id": "a", "content": "1"}, calling(A_CALL)]),
        "messages[0].tool_call_id",
        "invalid_value",
    ),
    "tools too long": (ask(tools=[function(description="word " * 20_000)]), "messages", "context_length_exceeded"),
}  # fmt: skip


@pytest.mark.parametrize("name", INVALID)
def test_invalid(served: Served, name: str) -> None:
    body, param, code = INVALID[name]
    response = served.post(body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code), error
    assert len(response.content) < 2048
    assert not served.engine.requests


def test_harmless_parameters_without_tools(served: Served) -> None:
    for fields in ({"tool_choice": "none"}, {"parallel_tool_calls": True}, {"tools": None, "tool_choice": None}):
        assert served.post({"messages": [user("Hi")], **fields}).status_code == 200, fields
