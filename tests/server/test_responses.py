"""POST /v1/responses over a real socket, asked by the real OpenAI client."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from pydantic import BaseModel

from engine.errors import RequestError
from server.prompt.tokenizer import Tokenizer
from server.requests.parameters import REFUSED_IN_RESPONSES
from server.responses.schema import ResponsesRequest

from .conftest import Served, Servers, audio_part
from .fake_engine import INFO
from .test_tools import CALL, TIME_CALL, prompt_of

PATH = "/v1/responses"
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": None,
    "parameters": {"type": "object", "properties": {"city": {"enum": ["Köln", None]}}},
    "strict": None,
}
TIME = {"type": "function", "name": "get_time"}


@pytest.fixture(scope="module")
def shared_server(servers: Servers) -> Served:
    """With room for a list of tools: the test tokenizer knows few words."""
    return servers.start(sse_keep_alive_interval=0.2, info=replace(INFO, max_model_len=4096))


def create(served: Served, **fields: Any) -> Any:
    return served.openai.responses.create(**{"model": "tiny-audio", "input": "Hi", **fields})


def said(text: str) -> dict[str, str]:
    return {"type": "input_text", "text": text}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream; each is named after its type."""
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def test_whole_response(served: Served, tokenizer: Tokenizer) -> None:
    response = create(served, instructions="Be brief.", metadata={"a": "b"})
    assert (response.id[:5], response.object, response.status) == ("resp_", "response", "completed")
    assert (response.model, response.error, response.incomplete_details) == ("tiny-audio", None, None)
    assert response.output_text == "Hello there!"
    (message,) = response.output
    assert (message.type, message.role, message.status, message.id[:4]) == (
        "message",
        "assistant",
        "completed",
        "msg_",
    )
    assert (response.instructions, response.metadata, response.store) == ("Be brief.", {"a": "b"}, False)
    assert (response.tools, response.tool_choice, response.parallel_tool_calls) == ([], "auto", True)
    assert (response.temperature, response.top_p, response.text.format.type) == (0.7, 0.5, "text")
    assert response.usage.input_tokens == len(served.engine.requests[0].prompt_token_ids)
    assert response.usage.output_tokens == len(served.engine.script.token_ids)
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response.usage.input_tokens_details.cached_tokens == 16
    assert prompt_of(served, tokenizer) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_conversation_with_audio(served: Served, tokenizer: Tokenizer) -> None:
    first = create(served, input=[user(audio_part(0.5), said("What is it?"))])
    follow_up = create(
        served,
        input=[
            user(audio_part(0.5), said("What is it?")),
            *[item.model_dump(exclude_none=True) for item in first.output],
            {"role": "developer", "content": "Be brief."},
            {"type": "message", "role": "user", "content": [audio_part(1.0)]},
        ],
    )
    assert follow_up.usage.input_tokens_details.audio_tokens == 12 + 25
    request = served.engine.requests[1]
    assert [clip.num_tokens for clip in request.clips] == [12, 25]
    prompt = prompt_of(served, tokenizer)
    assert "What is it?<|im_end|>\n<|im_start|>assistant\nHello there!<|im_end|>\n<|im_start|>system\nBe " in prompt


def test_parameters_reach_the_engine(served: Served) -> None:
    create(served, max_output_tokens=7, temperature=0, top_p=0.25, extra_body={"seed": 5, "top_k": 3, "stop": ["x"]})
    sampling = served.engine.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (7, 0, 0.25)
    assert (sampling.seed, sampling.top_k) == (5, 3)


@pytest.mark.parametrize("stream", [False, True])
def test_the_limit_makes_it_incomplete(served: Served, stream: bool) -> None:
    served.say("one two three four")
    response = create(served, max_output_tokens=3, stream=stream)
    if stream:
        *_, item_done, last = list(response)
        assert (last.type, item_done.item.status) == ("response.incomplete", "incomplete")
        response = last.response
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[0].status == "incomplete"
    assert response.usage.output_tokens == 3


def test_exact_events(served: Served) -> None:
    served.say("Hello there!", end=False)
    response = served.post({"input": "Hi", "stream": True}, PATH)
    assert response.headers["content-type"].startswith("text/event-stream")
    found = events(response.text)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    kinds = [event["type"].removeprefix("response.") for event in found]
    num_deltas = kinds.count("output_text.delta")
    assert num_deltas > 1
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * num_deltas,
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    created, _, added, part_added, *deltas, text_done, part_done, item_done, completed = found
    assert created["response"]["status"] == "in_progress"
    assert created["response"]["output"] == []
    assert created["response"]["usage"] is None
    message_id = added["item"]["id"]
    place = {"item_id": message_id, "output_index": 0, "content_index": 0}
    empty = {"type": "output_text", "annotations": [], "text": "", "logprobs": []}
    assert added["item"] == {
        "id": message_id, "type": "message", "role": "assistant", "content": [], "status": "in_progress"
    }  # fmt: skip
    assert part_added == {"type": "response.content_part.added", "sequence_number": 3, **place, "part": empty}
    assert all(event.items() >= place.items() for event in [*deltas, text_done, part_done])
    assert "".join(event["delta"] for event in deltas) == text_done["text"] == "Hello there!"
    assert part_done["part"] == {**empty, "text": "Hello there!"}
    assert item_done["item"] == {**added["item"], "content": [part_done["part"]], "status": "completed"}
    assert completed["response"]["output"] == [item_done["item"]]
    assert completed["response"]["id"] == created["response"]["id"]
    assert completed["response"]["usage"]["output_tokens"] == len(served.engine.script.token_ids)


def test_the_clients_own_helper_puts_a_stream_together(served: Served) -> None:
    served.say(f"I'll look.\n{CALL}\n{TIME_CALL}")
    with served.openai.responses.stream(model="tiny-audio", input="Hi", tools=[WEATHER, TIME]) as stream:
        response = stream.get_final_response()
    assert response.output_text == "I'll look."
    assert [item.type for item in response.output] == ["message", "function_call", "function_call"]


def test_an_empty_answer_is_a_message(served: Served) -> None:
    served.say("")
    response = create(served)
    assert response.output[0].content[0].text == ""
    assert response.status == "completed"


def test_logprobs(served: Served) -> None:
    served.say("é🎈", end=False)
    options = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    logprobs = create(served, **options).output[0].content[0].logprobs
    assert bytes(byte for token in logprobs for byte in token.bytes).decode() == "é🎈"
    assert len(logprobs[0].top_logprobs) == 2
    deltas = [
        event for event in create(served, stream=True, **options) if event.type == "response.output_text.delta"
    ]
    assert sum(len(delta.logprobs) for delta in deltas) == len(logprobs)


def test_calls_and_their_results(served: Served, tokenizer: Tokenizer) -> None:
    served.say(f"I'll look.\n{CALL}\n{TIME_CALL}")
    response = create(served, tools=[WEATHER, TIME])
    message, weather, clock = response.output
    assert (message.content[0].text, message.status) == ("I'll look.", "completed")
    assert (weather.name, weather.arguments, weather.status) == ("get_weather", '{"city": "Köln"}', "completed")
    assert weather.call_id.startswith("call_")
    assert weather.id.startswith("fc_")
    assert response.tools[0].parameters == WEATHER["parameters"]
    served.say("Yes.")
    results = [
        {"type": "function_call_output", "call_id": clock.call_id, "output": "12:00"},
        {"type": "function_call_output", "call_id": weather.call_id, "output": [said("21 °C")]},
    ]
    conversation = [
        user(said("Is it warm?")),
        *[item.model_dump(exclude_none=True) for item in response.output],
        *results,
    ]
    assert create(served, tools=[WEATHER, TIME], input=conversation).output_text == "Yes."
    assert prompt_of(served, tokenizer).endswith(
        f"<|im_start|>assistant\nI'll look.\n{CALL}\n{TIME_CALL}<|im_end|>\n<|im_start|>user\n"
        "<tool_response>\n12:00\n</tool_response>\n<tool_response>\n21 °C\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_events_of_calls(served: Served) -> None:
    served.say(f"{CALL}\n{TIME_CALL} Done.")
    body = {"input": "Hi", "stream": True, "tools": [WEATHER, TIME], "tool_choice": "auto"}
    found = events(served.post(body, PATH).text)
    kinds = [event["type"].removeprefix("response.") for event in found]
    a_call = [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    assert kinds[:11] == ["created", "in_progress", *a_call, *a_call, "output_item.added"]
    assert found[4]["arguments"] == found[3]["delta"] == '{"city": "Köln"}'
    assert (found[4]["name"], found[4]["item_id"]) == ("get_weather", found[2]["item"]["id"])
    assert [event["output_index"] for event in found[2:11]] == [0] * 4 + [1] * 4 + [2]
    output = found[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["function_call", "function_call", "message"]
    assert [item["status"] for item in output] == ["completed"] * 3


def test_demanded_calls_stream_as_they_come(served: Served) -> None:
    served.say(CALL)
    choice = {"type": "function", "name": "get_weather"}
    stream = create(served, stream=True, tools=[WEATHER, TIME], tool_choice=choice)
    deltas = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
    assert len(deltas) > 3
    assert "".join(deltas) == '{"city": "Köln"}'
    assert "get_weather" in served.engine.requests[0].sampling.grammar
    assert "get_time" not in served.engine.requests[0].sampling.grammar


def test_allowed_tools(served: Served, tokenizer: Tokenizer) -> None:
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_time"}]}
    response = create(served, tools=[WEATHER, TIME], tool_choice=choice)
    assert response.tool_choice.tools == choice["tools"]
    assert "get_weather" not in prompt_of(served, tokenizer)


class Answer(BaseModel):
    words: list[str]


def test_structured_text(served: Served) -> None:
    served.say('{"words": ["four"]}')
    response = served.openai.responses.parse(model="tiny-audio", input="Hi", text_format=Answer)
    assert response.output_parsed == Answer(words=["four"])
    assert response.text.format.schema_["properties"].keys() == {"words"}
    create(served, text={"format": {"type": "json_object"}})
    create(served, text={"format": {"type": "json_object"}}, tools=[TIME])
    create(served, text={"format": {"type": "text"}})
    grammars = [request.sampling.grammar for request in served.engine.requests]
    assert "words" in grammars[0]
    assert grammars[1]
    assert grammars[3] is None
    assert "tool_call" in grammars[2]


def test_failures(served: Served) -> None:
    served.say("one two three", failure=RequestError("NaN logits"))
    for stream in (False, True):
        response = served.post({"input": "Hi", "stream": stream}, PATH)
        assert (response.status_code, response.json()["error"]["message"]) == (500, "NaN logits")
    served.say("one two three", failure=RequestError("NaN logits"), fail_after=2)
    last = list(create(served, stream=True))[-1]
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert (last.response.error.code, last.response.error.message) == ("server_error", "NaN logits")


def test_null_equals_omitted(served: Served) -> None:
    body = {"input": "Hi", **dict.fromkeys({*ResponsesRequest.model_fields, *REFUSED_IN_RESPONSES} - {"input"})}
    assert served.post(body, PATH).status_code == 200


def test_harmless_values_pass_and_others_are_refused_by_name(served: Served) -> None:
    harmless = [(name, value) for name, refusal in REFUSED_IN_RESPONSES.items() for value in refusal.harmless]
    more = [("store", True), ("reasoning", {"effort": "low"}), ("include", ["reasoning.encrypted_content"]),
            ("tools", []), ("tool_choice", "auto"), ("user", "u"), ("service_tier", "auto"),
            ("text", {"format": {"type": "text"}, "verbosity": "low"}), ("max_tool_calls", 3)]  # fmt: skip
    for name, value in harmless + more:
        assert served.post({"input": "Hi", name: value}, PATH).status_code == 200, name
    for name in REFUSED_IN_RESPONSES:
        response = served.post({"input": "Hi", name: {"any": "thing"}}, PATH)
        assert (response.status_code, response.json()["error"]["param"]) == (400, name)


def inputs(*items: Any, **fields: Any) -> dict[str, Any]:
    return {"input": list(items), **fields}


A_CALL = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "a", "output": "1"}
INVALID = {
    "no input": ({}, "input", "missing_required_parameter"),
    "empty input": ({"input": ""}, "input", "empty_string"),
    "no items": (inputs(), "input", "empty_array"),
    "input a number": ({"input": 3}, "input", "invalid_type"),
    "item no object": (inputs("Hi"), "input[0]", "invalid_type"),
    "unknown item": (inputs({"type": "item_reference", "id": "x"}), "input[0].type", "invalid_value"),
    "unknown role": (inputs({"role": "tool", "content": "1"}), "input[0].role", "invalid_value"),
    "image": (inputs(user({"type": "input_image", "image_url": "x"})), "input[0].content[0].type", "invalid_value"),
    "part without type": (inputs(user({})), "input[0].content[0].type", "missing_required_parameter"),
    "bad audio": (inputs(user(said("a"), {"type": "input_audio", "input_audio": {"data": "!"}})),
                  "input[0].content[1]", "invalid_base64"),
    "audio of the system": (inputs({"role": "system", "content": [audio_part(0.1)]}), "input[0].content[0]",
                            "invalid_value"),
    "audio as output": (
        inputs(A_CALL, RESULT | {"output": [audio_part(0.1)]}), "input[1].output[0]", "invalid_value"
    ),
    "output of nothing": (inputs(RESULT), "input[0].call_id", "invalid_value"),
    "call without name": (inputs({"type": "function_call", "call_id": "a", "arguments": "{}"}), "input[0].name",
                          "missing_required_parameter"),
    "arguments no JSON": (inputs(A_CALL | {"arguments": "{"}), "input[0].arguments", "invalid_value"),
    "max_tokens": ({"input": "Hi", "max_tokens": 3}, "max_tokens", "unsupported_parameter"),
    "max_output_tokens": ({"input": "Hi", "max_output_tokens": 0}, "max_output_tokens", "integer_below_min_value"),
    "n": ({"input": "Hi", "n": 2}, "n", "unsupported_value"),
    "top_logprobs": ({"input": "Hi", "top_logprobs": 3}, "top_logprobs", "invalid_value"),
    "include": ({"input": "Hi", "include": ["everything"]}, "include[0]", "invalid_value"),
    "text format": ({"input": "Hi", "text": {"format": {"type": "xml"}}}, "text.format.type", "invalid_value"),
    "schema of the text": (
        {"input": "Hi", "text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}},
        "text.format.schema",
        "invalid_json_schema",
    ),
    "response_format": ({"input": "Hi", "response_format": {"type": "json_object"}}, "response_format",
                        "unsupported_parameter"),
    "regex beside tools": ({"input": "Hi", "tools": [TIME], "structured_outputs": {"regex": "a"}},
                           "structured_outputs", "invalid_value"),
    "web search": ({"input": "Hi", "tools": [{"type": "web_search"}]}, "tools[0].type", "invalid_value"),
    "tool twice": ({"input": "Hi", "tools": [TIME, TIME]}, "tools[1].name", "invalid_value"),
    "bad tool name": ({"input": "Hi", "tools": [{"type": "function", "name": "a b"}]}, "tools[0].name",
                      "invalid_value"),
    "choice without tools": ({"input": "Hi", "tool_choice": "required"}, "tool_choice", "invalid_value"),
    "unknown function": ({"input": "Hi", "tools": [TIME], "tool_choice": {"type": "function", "name": "f"}},
                         "tool_choice.name", "invalid_value"),
    "schema": (
        {"input": "Hi", "tools": [TIME | {"strict": True, "parameters": {"uniqueItems": True}}]},
        "tools[0].parameters",
        "invalid_json_schema",
    ),
    "metadata": ({"input": "Hi", "metadata": {"a": 1}}, "metadata.a", "invalid_type"),
    "too long": ({"input": "word " * 20_000}, "input", "context_length_exceeded"),
}  # fmt: skip


@pytest.mark.parametrize("name", INVALID)
def test_invalid(served: Served, name: str) -> None:
    body, param, code = INVALID[name]
    response = served.post(body, PATH)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code), error
    assert not served.engine.requests
