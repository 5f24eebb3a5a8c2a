"""The requests of POST /v1/responses: OpenAI's fields, audio parts as an extension, and chat's sampling extras.

Input is a text, or a list of items: messages, calls and their results. Nothing is ever stored here, so whatever
refers to something stored is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, JsonValue, Tag, model_validator

from server.requests.constraints import JsonObjectFormat, NamedSchema, SchemaValue, TextFormat, UnknownFormat
from server.requests.content_parts import AudioUrlPart, InputAudioPart, TemplateAudioPart, UnknownPart
from server.requests.parameters import REFUSED_IN_RESPONSES, refused
from server.requests.schema import Count, GenerationRequest
from server.requests.strict_model import MAX_ITEMS, StrictModel
from server.requests.tool_messages import CallId, FunctionCall
from server.requests.tools import (
    MAX_TOOLS,
    FunctionDefinition,
    ToolMode,
    UnknownChoice,
    UnknownTool,
    check_unique,
    choice_tag,
    choose_tools,
    tag_by_type,
)
from server.tools.plan import ToolPlan

LOGPROBS = "message.output_text.logprobs"
Includable = Literal[
    "message.output_text.logprobs",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]
"""Only the first has an effect: what the others would add does not exist here."""


class InputTextPart(StrictModel):
    """Text: of the input, or of an earlier answer."""

    type: Literal["input_text", "output_text"]
    text: str


class UnknownInputPart(UnknownPart):
    """Any other part: always refused, by the name of its type."""

    supported = "input_text, input_audio and audio_url"


InputPart = Annotated[
    Annotated[InputTextPart, Tag("<input_text>")]
    | Annotated[InputTextPart, Tag("<output_text>")]
    | Annotated[InputAudioPart, Tag("<input_audio>")]
    | Annotated[AudioUrlPart, Tag("<audio_url>")]
    | Annotated[TemplateAudioPart, Tag("<audio>")]
    | Annotated[UnknownInputPart, Tag("<unknown>")],
    tag_by_type("input_text", "output_text", "input_audio", "audio_url", "audio"),
]


def _list_tag(value: object) -> str:
    return "<list>" if isinstance(value, list) else "<string>"


InputContent = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[list[InputPart], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True), Tag("<list>")],
    Discriminator(_list_tag),
]


class MessageItem(StrictModel):
    """A message. Only a user's may hold audio."""

    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer", "assistant"]
    content: InputContent

    @model_validator(mode="after")
    def _check_audio(self) -> Self:
        if self.role != "user":
            check_text(
                self.content, f"Audio is only supported in user messages, not in {self.role} messages.", "content"
            )
        return self


class CallItem(FunctionCall):
    """A call of an earlier answer."""

    type: Literal["function_call"]
    call_id: CallId


class ResultItem(StrictModel):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: InputContent

    @model_validator(mode="after")
    def _check_output(self) -> Self:
        check_text(self.output, "Only text is supported as the output of a call.", "output")
        return self


class UnknownItem(StrictModel):
    """Any other item: always refused, by the name of its type."""

    type: JsonValue = None

    @model_validator(mode="after")
    def _refuse(self) -> Self:
        name = repr(self.type[:40]) if isinstance(self.type, str) else "that"
        message = f"Items of type {name} are not supported; message, function_call and function_call_output are."
        raise refused("type", message, "invalid_value")


def _item_tag(item: object) -> str:
    kind = item.get("type", "message") if isinstance(item, Mapping) else None
    known = ("message", "function_call", "function_call_output")
    return f"<{kind}>" if isinstance(kind, str) and kind in known else "<unknown>"


Item = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[CallItem, Tag("<function_call>")]
    | Annotated[ResultItem, Tag("<function_call_output>")]
    | Annotated[UnknownItem, Tag("<unknown>")],
    Discriminator(_item_tag),
]


class ResponseFunction(FunctionDefinition):
    """A function: what chat completions nest stands beside its type."""

    type: Literal["function"]


class NamedResponseFunction(StrictModel):
    type: Literal["function"]
    name: str


class AllowedResponseTools(StrictModel):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedResponseFunction], Field(min_length=1, max_length=MAX_TOOLS)]


ResponseTool = Annotated[
    Annotated[ResponseFunction, Tag("<function>")] | Annotated[UnknownTool, Tag("<unknown>")],
    tag_by_type("function"),
]
ResponseToolChoice = Annotated[
    Annotated[ToolMode, Tag("<mode>")]
    | Annotated[NamedResponseFunction, Tag("<function>")]
    | Annotated[AllowedResponseTools, Tag("<allowed_tools>")]
    | Annotated[UnknownChoice, Tag("<unknown>")],
    Discriminator(choice_tag),
]


class SchemaFormat(NamedSchema):
    """What chat completions nest stands beside the type."""

    type: Literal["json_schema"]


class TextConfig(StrictModel):
    """How the answer's text shall look."""

    format: (
        Annotated[
            Annotated[TextFormat, Tag("<text>")]
            | Annotated[JsonObjectFormat, Tag("<json_object>")]
            | Annotated[SchemaFormat, Tag("<json_schema>")]
            | Annotated[UnknownFormat, Tag("<unknown>")],
            tag_by_type("text", "json_object", "json_schema"),
        ]
        | None
    ) = None


class ResponsesRequest(GenerationRequest):
    """POST /v1/responses."""

    model_config = ConfigDict(extra="allow")
    refusals = REFUSED_IN_RESPONSES

    input: Annotated[
        Annotated[str, Field(min_length=1), Tag("<string>")]
        | Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True), Tag("<list>")],
        Discriminator(_list_tag),
    ]
    instructions: str | None = None
    """A system message before the input."""
    max_output_tokens: Count | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: Annotated[list[Includable], Field(max_length=MAX_ITEMS)] | None = None
    text: TextConfig | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    """Given back as it came."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_tokens is not None:
            raise refused("max_tokens", "Unsupported parameter: 'max_tokens' (it is max_output_tokens here).")
        if self.response_format is not None:
            raise refused("response_format", "Unsupported parameter: 'response_format' (it is text.format here).")
        if self.n is not None and self.n > 1:
            raise refused("n", "Unsupported value: a response is one answer.", "unsupported_value")
        for name in ("echo", "return_token_ids"):
            if getattr(self, name):
                raise refused(name, f"Unsupported parameter: '{name}' has no place in a response.")
        if self.top_logprobs and LOGPROBS not in (self.include or ()):
            message = f"The 'top_logprobs' parameter is only allowed when '{LOGPROBS}' is included."
            raise refused("top_logprobs", message, "invalid_value")
        self._check_results()
        if self.tool_plan.functions and self.structured_outputs is not None:
            message = "The answer cannot both call tools and follow 'structured_outputs'."
            raise refused("structured_outputs", message, "invalid_value")
        return self

    def _check_results(self) -> None:
        called: set[str] = set()
        for index, item in enumerate(self.input if isinstance(self.input, list) else ()):
            if isinstance(item, CallItem):
                called.add(item.call_id)
            elif isinstance(item, ResultItem) and item.call_id not in called:
                text = "Invalid 'call_id': no function call with this id comes before this output."
                raise refused(f"input[{index}].call_id", text, "invalid_value")

    @property
    def tool_plan(self) -> ToolPlan:
        """What the answer may call. Raises PydanticCustomError, but not once the request is valid."""
        return _tool_plan(self.tools, self.tool_choice, self.parallel_tool_calls)

    @property
    def answer_schema(self) -> tuple[SchemaValue, str] | None:
        match self.text.format if self.text else None:
            case JsonObjectFormat():
                return {"type": "object"}, "text.format"
            case SchemaFormat(schema_=schema):
                return schema, "text.format.schema"
            case _:
                return None

    @property
    def token_limit(self) -> int | None:
        return self.max_output_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if LOGPROBS in (self.include or ()) else None


def check_text(content: InputContent, message: str, where: str) -> None:
    """Raise PydanticCustomError unless the content is text."""
    for index, part in enumerate(content if isinstance(content, list) else ()):
        if not isinstance(part, InputTextPart):
            raise refused(f"{where}[{index}]", message, "invalid_value")


def _tool_plan(
    tools: Sequence[ResponseTool] | None, choice: ResponseToolChoice | None, parallel: bool | None
) -> ToolPlan:
    functions = [
        tool.function(f"tools[{index}]")
        for index, tool in enumerate(tools or ())
        if isinstance(tool, ResponseFunction)
    ]
    check_unique(functions, "name")
    match choice:
        case NamedResponseFunction():
            allowed, mode = [(choice.name, "tool_choice.name")], "required"
        case AllowedResponseTools():
            allowed = [(tool.name, f"tool_choice.tools[{k}].name") for k, tool in enumerate(choice.tools)]
            mode = choice.mode
        case _:
            assert not isinstance(choice, UnknownChoice), "refused by its validator"
            allowed, mode = [], choice or "auto"
    is_parallel = parallel is not False and not isinstance(choice, NamedResponseFunction)
    is_chosen = choice not in (None, "auto")
    return choose_tools(functions, mode, allowed, is_parallel=is_parallel, is_chosen=is_chosen)
