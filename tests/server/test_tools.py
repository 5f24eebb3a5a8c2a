"""Tools in POST /v1/chat/completions: what the model reads, and the calls that clients get."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from llguidance import LLMatcher, LLTokenizer
from pydantic import BaseModel

from server.prompt.tokenizer import Tokenizer

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


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


def calling(*calls: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": list(calls), **fields}


def choose(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [choose(name) for name in names]}}


STRICT = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
JSON = {
    "type": "json_schema",
    "json_schema": {"name": "a", "schema": {"properties": {"a": {"type": "integer"}}, "required": ["a"]}},
}
ANY = function(name="get_time", parameters={})
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


class Weather(BaseModel):
    city: str


def test_the_clients_own_helper_parses_arguments(served: Served) -> None:
    served.say(CALL)
    tool = openai.pydantic_function_tool(Weather, name="get_weather")  # a strict one
    answer = served.openai.chat.completions.parse(model="tiny-audio", messages=[user("Hi")], tools=[tool])
    assert answer.choices[0].message.tool_calls[0].function.parsed_arguments == Weather(city="Köln")
    assert "get_weather" in served.engine.requests[0].sampling.grammar


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


def test_a_call_that_is_whole_at_the_limit_is_not_cut(served: Served) -> None:
    served.say(CALL.removesuffix("\n</tool_call>"), tokens_per_step=1000)
    limit = len(served.engine.script.token_ids) - 1
    for parallel, reason in ((False, "tool_calls"), (True, "length")):
        choice = create(served, parallel_tool_calls=parallel, max_completion_tokens=limit).choices[0]
        assert choice.message.tool_calls[0].function.arguments == '{"city": "Köln"}'
        assert choice.finish_reason == reason


@pytest.mark.parametrize("num_tokens", [2, 3, 7, 1000])
@pytest.mark.parametrize("stream", [False, True])
def test_tokens_that_come_together_change_nothing(served: Served, num_tokens: int, stream: bool) -> None:
    """Speculative decoding gives several in a step, and a call or a stop string may end the answer among them."""
    cases: list[tuple[str, dict[str, Any]]] = [
        (f"I'll look.\n{CALL}\n{TIME_CALL}\nand more", {"parallel_tool_calls": False}),
        (f"I'll look.\n{CALL}\n{TIME_CALL}", {"n": 2}),
        ("What does the person say? héllo 🎉 wörld", {"stop": ["son sa"], "tools": None}),
        ("What does the person say? héllo 🎉 wörld", {"max_completion_tokens": 11, "tools": None, "n": 2}),
        ("What does the person say?", {"return_token_ids": True, "tools": None}),
    ]
    for text, fields in cases:
        told = []
        for together in (1, num_tokens):
            served.say(text, tokens_per_step=together)
            options = {"logprobs": True, "top_logprobs": 1, **fields}
            told.append(told_by(served, options, stream=stream))
        assert told[1] == told[0]


def told_by(served: Served, fields: dict[str, Any], *, stream: bool) -> Any:
    """What a client has of an answer in the end: by choice, whatever the pieces were; and usage."""
    if not stream:
        body = served.post(ask(**fields)).json()
        return without_ids(body["choices"]), body["usage"]
    chunks = events(served.post(ask(stream=True, stream_options={"include_usage": True}, **fields)).text)
    told: dict[int, list[Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta, known = choice["delta"], told.setdefault(choice["index"], ["", "", [], [], None])
            known[0] += delta.get("content") or ""
            for call in delta.get("tool_calls") or ():
                known[1] += (call["function"].get("name") or "") + (call["function"].get("arguments") or "")
            known[2] += (choice.get("logprobs") or {}).get("content") or []
            known[3] += choice.get("token_ids") or []
            known[4] = choice["finish_reason"] or known[4]
    return told, chunks[-1]["usage"]


def without_ids(choices: list[Any]) -> list[Any]:
    """Calls have random ids."""
    for choice in choices:
        for call in choice["message"].get("tool_calls") or ():
            del call["id"]
    return choices


def test_choice_none_means_no_tools(served: Served, tokenizer: Tokenizer) -> None:
    served.say(CALL)
    choice = create(served, tool_choice="none").choices[0]
    assert (choice.message.content, choice.finish_reason) == (CALL, "stop")
    assert "# Tools" not in prompt_of(served, tokenizer)


def test_allowed_tools_are_the_only_ones(served: Served, tokenizer: Tokenizer) -> None:
    served.say(f"{CALL}\n{TIME_CALL}")
    message = create(served, tool_choice=allowed("auto", "get_time")).choices[0].message
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


@pytest.fixture(scope="module")
def matches(checkpoint: Path) -> Callable[[str, str], bool]:
    """Whether a grammar lets an answer pass and end."""
    tokenizer = LLTokenizer(str(checkpoint / "tokenizer.json"))

    def check(grammar: str, answer: str) -> bool:
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        return matcher.consume_tokens(tokenizer.tokenize_str(answer)) and matcher.is_accepting()

    return check


WRONG_CALL = CALL.replace('"Köln"', "3")
SOME_CALL = TIME_CALL.replace("{}", '{"any": 1}')


@pytest.mark.parametrize(("fields", "right", "wrong"), [
    ({"tool_choice": "required"}, [CALL, TIME_CALL, f"{CALL}\n{TIME_CALL}"],
     ["", "Ok", f"Ok{CALL}", WRONG_CALL, SOME_CALL, f"{CALL}Ok"]),
    ({"tool_choice": "required", "parallel_tool_calls": False}, [CALL, TIME_CALL], [f"{CALL}\n{TIME_CALL}"]),
    ({"tool_choice": choose("get_time")}, [TIME_CALL], [CALL, SOME_CALL, f"{TIME_CALL}\n{TIME_CALL}"]),
    ({"tool_choice": allowed("required", "get_time")}, [TIME_CALL, f"{TIME_CALL}\n{TIME_CALL}"], [CALL]),
    ({"tools": [STRICT, TIME]}, ["Ok <tool_", f"Ok\n{CALL}\n{TIME_CALL}", CALL, ""],
     [WRONG_CALL, f"Ok{WRONG_CALL}", SOME_CALL, "<tool_call>\n"]),
    ({"response_format": JSON}, ['{"a": 1}', CALL, WRONG_CALL, f"{CALL}\n{TIME_CALL}"],
     ["Ok", '{"a": "b"}', '{"a": 1}' + CALL, "Ok" + CALL]),
    ({"response_format": JSON, "tools": [STRICT]}, ['{"a": 1}', CALL], ["Ok", WRONG_CALL]),
    ({"response_format": JSON, "tool_choice": "required"}, [CALL], ['{"a": 1}', WRONG_CALL]),
    ({"response_format": JSON, "tool_choice": "none"}, ['{"a": 1}'], [CALL]),
    ({"tools": [STRICT, ANY], "parallel_tool_calls": False}, [f"Ok{CALL}", SOME_CALL],
     [WRONG_CALL, f"{CALL}\n{CALL}"]),
])  # fmt: skip
def test_calls_are_constrained(
    served: Served,
    matches: Callable[[str, str], bool],
    fields: dict[str, Any],
    right: list[str],
    wrong: list[str],
) -> None:
    assert served.post(ask(**fields)).status_code == 200
    grammar = served.engine.requests[-1].sampling.grammar
    assert [answer for answer in right if not matches(grammar, answer)] == []
    assert [answer for answer in wrong if matches(grammar, answer)] == []


def test_a_free_choice_is_not_constrained(served: Served) -> None:
    served.post(ask())
    served.post(ask(tool_choice="none", tools=[STRICT]))
    assert [request.sampling.grammar for request in served.engine.requests] == [None, None]


def test_constrained_calls_are_streamed_as_they_come(served: Served) -> None:
    served.say(f"{CALL}\n{TIME_CALL}")
    chunks = events(served.post(ask(stream=True, tool_choice="required")).text)
    calls = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    first, *others = [call for call in calls if call["index"] == 0]
    assert (first["type"], first["function"]["name"]) == ("function", "get_weather")
    assert all(call.keys() == {"index", "function"} and call["function"].keys() == {"arguments"} for call in others)
    assert first["function"]["arguments"] + "".join(call["function"]["arguments"] for call in others) == (
        '{"city": "Köln"}'
    )
    assert len(others) > 3
    assert all(not chunk["choices"][0]["delta"].get("content") for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_limit_that_cuts_a_constrained_call(served: Served) -> None:
    served.say(CALL)
    cut = len(served.engine.script.token_ids) - 12
    choice = create(served, tool_choice="required", max_completion_tokens=cut).choices[0]
    assert choice.finish_reason == "length"
    assert '{"city": "Köln"}'.startswith(choice.message.tool_calls[0].function.arguments)


def test_a_stop_string_that_cuts_a_call_does_not_pass_for_a_whole_one(served: Served) -> None:
    served.say(f"{CALL}\n{TIME_CALL}")
    choice = create(served, tool_choice="required", stop="Köln").choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "Köln")
    assert choice.message.tool_calls[0].function.arguments == '{"city": "'
    choice = create(served, tool_choice="required", stop="</tool_call>").choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("tool_calls", "</tool_call>")
    assert choice.message.tool_calls[0].function.arguments == '{"city": "Köln"}'


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
    "required, with a schema that cannot be honoured": (
        ask(tools=[function(parameters={"uniqueItems": True})], tool_choice="required"),
        "tools[0].function.parameters",
        "invalid_json_schema",
    ),
    "strict, with a schema that nothing satisfies": (
        ask(tools=[function(parameters={"properties": {"a": False}, "required": ["a"]}, strict=True)]),
        "tools",
        "invalid_json_schema",
    ),
    "required, with a reference to itself": (
        ask(
            tools=[function(parameters={"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}})],
            tool_choice="required",
        ),
        "tools",
        "invalid_json_schema",
    ),
    "text with a schema that cannot be honoured": (
        ask(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}),
        "response_format.json_schema.schema",
        "invalid_json_schema",
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
    "a regex beside tools": (ask(structured_outputs={"regex": "a"}), "structured_outputs", "invalid_value"),
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
