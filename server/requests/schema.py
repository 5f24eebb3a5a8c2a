"""The requests that are accepted, as pydantic models: OpenAI's fields, and vLLM's extras that have an effect.

Strict: a string is no number, NaN is no number at all. Fields that are not honoured are decided upon in
parameters.py. `null` equals omitted. Ranges that only the checkpoint knows (token ids) are checked in
server/generation/sampling.py. Tags of unions are written `<so>`, so that server/http/body.py can
leave them out of paths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from server.requests.constraints import (
    JsonObjectFormat,
    JsonSchemaFormat,
    ResponseFormat,
    SchemaValue,
    StructuredOutputs,
)
from server.requests.content_parts import AudioInput, Content, content_tag
from server.requests.parameters import (
    REFUSED_IN_CHAT,
    REFUSED_IN_COMPLETIONS,
    REFUSED_IN_MESSAGES,
    Refusal,
    check_refused,
    refused,
)
from server.requests.strict_model import MAX_ITEMS, StrictModel
from server.requests.text_content import TextPart
from server.requests.tool_messages import CallingMessage, ToolMessage, check_results
from server.requests.tools import MAX_TOOLS, Tool, ToolChoice, tool_plan
from server.tools.plan import ToolPlan

MAX_STOP_CHARS = 1024
"""Of one stop string; the text held back while it may be beginning is as long."""
MAX_CHOICES = 128
"""Answers to one prompt."""
MAX_TOTAL_CHOICES = 1024
"""Answers to all prompts of one request."""
MAX_COUNT = 2**31 - 1
"""Of token counts: far above any context, and small enough for every tensor type."""

Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0, le=MAX_COUNT)]
LongAudio = Literal["split", "error", "truncate"]
"""What becomes of a recording that is longer than the model's window."""


class Message(StrictModel):
    """One turn. Only a user's may hold audio."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_refused(self.model_extra, REFUSED_IN_MESSAGES)
        if self.role != "user" and isinstance(self.content, list):
            for index, part in enumerate(self.content):
                if not isinstance(part, TextPart):
                    message = f"Audio is only supported in user messages, not in {self.role} messages."
                    raise refused(f"content[{index}]", message, "invalid_value")
        return self


def _message_tag(message: object) -> str:
    if not isinstance(message, Mapping):
        return "<message>"
    if message.get("role") == "tool":
        return "<result>"
    return "<calls>" if message.get("role") == "assistant" and message.get("tool_calls") else "<message>"


AnyMessage = Annotated[
    Annotated[Message, Tag("<message>")]
    | Annotated[CallingMessage, Tag("<calls>")]
    | Annotated[ToolMessage, Tag("<result>")],
    Discriminator(_message_tag),
]


class StreamOptions(StrictModel):
    include_usage: bool | None = None


class GenerationRequest(StrictModel):
    """What chat and completions have in common."""

    model_config = ConfigDict(extra="allow")
    refusals: ClassVar[Mapping[str, Refusal]] = {}

    model: str | None = None
    """Omitted: the model that is served."""
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Fraction | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: (
        Annotated[
            Annotated[StopString, Tag("<string>")]
            | Annotated[list[StopString], Field(min_length=1, max_length=4), Tag("<parts>")],
            Discriminator(content_tag),
        ]
        | None
    ) = None
    seed: Seed | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_ITEMS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_COUNT)] | None = None
    """0 or -1: off."""
    min_p: Fraction | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_ITEMS)] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    echo: bool | None = None
    """Begin the answer with what it continues: the prompt, or in a chat the last message if the assistant's."""
    return_token_ids: bool | None = None
    priority: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    """Lower goes first."""
    cache_salt: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Only a caller's requests with the same salt share what is computed of their audio."""
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    long_audio: LongAudio | None = None
    """Tympan's own: what becomes of audio over 30 s. Omitted: as the server is set."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        check_refused(self.model_extra, self.refusals)
        if self.stream_options is not None and not self.stream:
            message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
            raise refused("stream_options", message, "invalid_value")
        limit = self.token_limit
        if limit is not None and self.min_tokens is not None and self.min_tokens > limit:
            message = f"Invalid 'min_tokens': it must not be above the token limit of {limit}."
            raise refused("min_tokens", message, "invalid_value")
        if self.answer_schema is not None and self.structured_outputs is not None:
            message = "The answer cannot follow both 'response_format' and 'structured_outputs'."
            raise refused("structured_outputs", message, "invalid_value")
        return self

    @property
    def token_limit(self) -> int | None:
        """How many tokens the answer may have, if the request says so."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives to list with each token; None: no log-probabilities at all."""
        return None

    @property
    def num_choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def answer_schema(self) -> tuple[SchemaValue, str] | None:
        """The JSON schema that the text of the answer shall satisfy, and where in the request it stands."""
        match self.response_format:
            case JsonObjectFormat():
                return {"type": "object"}, "response_format"
            case JsonSchemaFormat(json_schema=named):
                return named.schema_, "response_format.json_schema.schema"
            case _:
                return None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, however they were written."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)


class Rendering(StrictModel):
    """What, beside the messages of a conversation, decides how its prompt reads: its end and the tools."""

    model_config = ConfigDict(extra="allow")

    add_generation_prompt: bool | None = None
    """True unless the final message is continued."""
    continue_final_message: bool | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @property
    def tool_plan(self) -> ToolPlan:
        """What the answer may call. Raises PydanticCustomError, but not once the request is valid."""
        return tool_plan(self.tools, self.tool_choice, self.parallel_tool_calls)

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        tool_plan(self.tools, self.tool_choice, self.parallel_tool_calls)
        return self

    def check_messages(self, messages: Sequence[AnyMessage]) -> None:
        """Raise PydanticCustomError for messages that cannot be rendered so."""
        check_results(messages)
        if not self.continue_final_message:
            return
        if self.add_generation_prompt:
            message = "'continue_final_message' and 'add_generation_prompt' cannot both be true."
            raise refused("continue_final_message", message, "invalid_value")
        if messages[-1].role != "assistant":
            message = "'continue_final_message' needs a last message of the assistant's."
            raise refused("continue_final_message", message, "invalid_value")
        if isinstance(messages[-1], CallingMessage):
            message = "'continue_final_message' needs a last message without 'tool_calls': it ends with them."
            raise refused("continue_final_message", message, "invalid_value")


class ChatRequest(Rendering, GenerationRequest):
    """POST /v1/chat/completions."""

    refusals = REFUSED_IN_CHAT

    messages: Annotated[list[AnyMessage], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
    max_completion_tokens: Count | None = None
    """Wins over max_tokens, its older name."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check_conversation(self) -> Self:
        self.check_messages(self.messages)
        if self.tool_plan.functions and self.structured_outputs is not None:
            message = "The answer cannot both call tools and follow 'structured_outputs'."
            raise refused("structured_outputs", message, "invalid_value")
        return self

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            message = "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled."
            raise refused("top_logprobs", message, "invalid_value")
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def _prompt_tag(prompt: object) -> str:
    """What a prompt is made of, by its first item."""
    first = prompt[0] if isinstance(prompt, list) and prompt else prompt
    if first is prompt:
        return "<ids>" if isinstance(prompt, list) else "<string>"
    return "<strings>" if isinstance(first, str) else "<lists>" if isinstance(first, list) else "<ids>"


PromptText = Annotated[str, Field(min_length=1)]
PromptIds = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(GenerationRequest):
    """POST /v1/completions: raw prompts whose control and placeholder tokens count, with their clips beside them."""

    refusals = REFUSED_IN_COMPLETIONS
    DEFAULT_MAX_TOKENS: ClassVar[int] = 16

    prompt: Annotated[
        Annotated[PromptText, Tag("<string>")]
        | Annotated[PromptIds, Tag("<ids>")]
        | Annotated[list[PromptText], Field(max_length=MAX_TOTAL_CHOICES), Tag("<strings>")]
        | Annotated[list[PromptIds], Field(max_length=MAX_TOTAL_CHOICES), Tag("<lists>")],
        Discriminator(_prompt_tag),
    ]
    """One prompt, or several."""
    max_tokens: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = None
    """0 only echoes."""
    best_of: Annotated[int, Field(ge=0, le=MAX_CHOICES)] | None = None
    """Only what has no effect: as many as `n`."""
    audio: Annotated[list[AudioInput], Field(max_length=MAX_ITEMS)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @model_validator(mode="after")
    def _check_prompts(self) -> Self:
        if self.best_of is not None and self.best_of != self.num_choices:
            message = "Unsupported parameter: 'best_of' (other than 'n': answers are not ranked)."
            raise refused("best_of", message)
        if self.max_tokens == 0 and not self.echo:
            raise refused("max_tokens", "Invalid 'max_tokens': 0 is only allowed with 'echo'.", "invalid_value")
        if self.echo and self.logprobs is not None:
            message = "Unsupported parameter: 'logprobs' with 'echo' (prompts have no log-probabilities here)."
            raise refused("logprobs", message)
        if len(self.prompts) * self.num_choices > MAX_TOTAL_CHOICES:
            message = f"Invalid 'n': prompts times 'n' must not be above {MAX_TOTAL_CHOICES}."
            raise refused("n", message, "invalid_value")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, however they were written."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        several = [part for part in self.prompt if not isinstance(part, int)]
        ids = [part for part in self.prompt if isinstance(part, int)]
        return [ids] if ids else list(several)

    @property
    def token_limit(self) -> int:
        return self.DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs
