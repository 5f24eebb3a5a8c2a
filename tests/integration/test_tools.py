"""Tools with the bundled checkpoint: it has never seen any, yet what it is made to call is valid."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from tests.integration.conftest import ServerProcess, input_audio
from tests.integration.test_bundled import DIGITS, SPEECH

LIGHTS = {
    "type": "object",
    "properties": {
        "room": {"enum": ["kitchen", "bedroom"]},
        "level": {"type": "integer", "minimum": 0, "maximum": 100},
        "colours": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 2},
    },
    "required": ["room", "level"],
    "additionalProperties": False,
}
TIMER = {
    "type": "object",
    "properties": {"seconds": {"type": "integer", "minimum": 1, "maximum": 600}},
    "required": ["seconds"],
    "additionalProperties": False,
}
SCHEMAS = {"set_lights": LIGHTS, "start_timer": TIMER}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()
]
MESSAGES: list[Any] = [{"role": "user", "content": [input_audio((SPEECH / DIGITS).read_bytes())]}]
TIMER_CHOICE: Any = {"type": "function", "function": {"name": "start_timer"}}


def check(name: str, arguments: str) -> None:
    jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@pytest.mark.parametrize("choice", ["required", TIMER_CHOICE])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_demanded_calls_satisfy_their_schema(choice: Any, seed: int, bundled_server: ServerProcess) -> None:
    answer = bundled_server.openai.chat.completions.create(
        model="tympan-tiny", messages=MESSAGES, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False,
        seed=seed, temperature=1,
    )  # fmt: skip
    (call,) = answer.choices[0].message.tool_calls
    assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("tool_calls", None)
    assert choice == "required" or call.function.name == "start_timer"
    check(call.function.name, call.function.arguments)


def test_streamed_calls_satisfy_their_schema(bundled_server: ServerProcess) -> None:
    options: Any = {
        "model": "tympan-tiny",
        "messages": MESSAGES,
        "tools": TOOLS,
        "tool_choice": "required",
        "seed": 4,
    }
    whole = bundled_server.openai.chat.completions.create(**options, max_tokens=200)
    with bundled_server.openai.chat.completions.stream(**options, max_tokens=200) as stream:
        pieces = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        message = stream.current_completion_snapshot.choices[0].message
    assert len(pieces) > 2
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls]
    assert calls == [(call.function.name, call.function.arguments) for call in whole.choices[0].message.tool_calls]
    check(*calls[0])


def test_a_conversation_goes_on_after_a_call(bundled_server: ServerProcess) -> None:
    tools: list[Any] = [{"type": "function", "name": name, "parameters": SCHEMAS[name]} for name in SCHEMAS]
    response = bundled_server.openai.responses.create(
        model="tympan-tiny", input=MESSAGES, tools=tools, tool_choice="required", parallel_tool_calls=False
    )
    (call,) = response.output
    check(call.name, call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    conversation = [*MESSAGES, call.model_dump(exclude_none=True), result]
    events = list(
        bundled_server.openai.responses.create(
            model="tympan-tiny", input=conversation, stream=True, max_output_tokens=20
        )
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text
    assert events[-1].response.usage.input_tokens_details.audio_tokens > 0
