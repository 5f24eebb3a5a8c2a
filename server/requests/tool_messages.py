"""The messages in which tools were called and answered, as a conversation brings them back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, JsonValue, field_validator, model_validator
from pydantic_core import from_json

from server.requests.parameters import REFUSED_IN_MESSAGES, check_refused, refused
from server.requests.strict_model import StrictModel
from server.requests.text_content import TextContent
from server.requests.tools import MAX_TOOLS, invalid_here
from server.tools.plan import CalledFunction

MAX_NAME_CHARS = 64
MAX_ID_CHARS = 256

CallId = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]


class FunctionCall(StrictModel):
    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
    arguments: str
    """A JSON object, as text; empty: no arguments."""

    @field_validator("arguments")
    @classmethod
    def _check_arguments(cls, arguments: str) -> str:
        parse_arguments(arguments)
        return arguments


class ToolCall(StrictModel):
    """A call of an earlier turn."""

    id: CallId
    type: Literal["function"] = "function"
    function: FunctionCall

    def called(self) -> CalledFunction:
        """As turns have it."""
        return CalledFunction(self.id, self.function.name, parse_arguments(self.function.arguments))


class CallingMessage(StrictModel):
    """An assistant's turn that calls tools; it may say something before."""

    model_config = ConfigDict(extra="allow")

    role: Literal["assistant"]
    content: TextContent | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=MAX_TOOLS)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_refused(self.model_extra, REFUSED_IN_MESSAGES)
        return self


class ToolMessage(StrictModel):
    """The result of a call."""

    role: Literal["tool"]
    content: TextContent
    tool_call_id: CallId


def parse_arguments(text: str) -> dict[str, JsonValue]:
    """The arguments of a call. Raises PydanticCustomError unless they are a JSON object."""
    try:
        arguments = from_json(text, allow_inf_nan=False) if text.strip() else {}
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise invalid_here("The arguments of a call must be a JSON object, as text.")
    return arguments


def check_results(messages: Sequence[object]) -> None:
    """Raise PydanticCustomError that names the first tool message whose call does not come before it."""
    called: set[str] = set()
    for index, message in enumerate(messages):
        if isinstance(message, CallingMessage):
            called.update(call.id for call in message.tool_calls)
        elif isinstance(message, ToolMessage) and message.tool_call_id not in called:
            text = "Invalid 'tool_call_id': no tool call with this id comes before this message."
            raise refused(f"messages[{index}].tool_call_id", text, "invalid_value")
