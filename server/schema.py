"""The requests that are accepted, as pydantic models: OpenAI's fields, and vLLM's extras that have an effect.

Strict: a string is no number, NaN is no number at all. Fields that are not honoured are decided upon in
server/parameters.py. `null` equals omitted. Ranges that only the checkpoint knows (token ids) are checked in
server/sampling.py. Tags of unions are written `<so>`, so that server/body.py can leave them out of paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag, model_validator

from server.parameters import (
    REFUSED_IN_CHAT,
    REFUSED_IN_COMPLETIONS,
    REFUSED_IN_MESSAGES,
    Refusal,
    check_refused,
    refused,
)

MAX_STOP_CHARS = 1024
"""Of one stop string; the text held back while it may be beginning is as long."""
MAX_ITEMS = 4096
"""Of messages, parts and token lists: no context holds more that means something."""
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


class StrictModel(BaseModel):
    """What all parts of a request share."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore", frozen=True, protected_namespaces=())


class InputAudio(StrictModel):
    """Audio inside the request, or uploaded before it."""

    data: str | None = None
    """Base64, or a whole data: URL."""
    id: str | None = None
    """Of an upload (POST /v1/files), instead of data."""
    format: str | None = None
    """A hint only: the bytes are sniffed."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.data is None and self.id is None:
            raise refused("data", "Missing required parameter: 'data', or 'id'.", "missing_required_parameter")
        if self.data is not None and self.id is not None:
            raise refused("id", "Audio comes either with 'data' or with the 'id' of an upload.", "invalid_value")
        return self


class AudioUrl(StrictModel):
    """Audio elsewhere."""

    url: str
    """http:, https: or data:."""


class TextPart(StrictModel):
    type: Literal["text"] = "text"
    text: str


class InputAudioPart(StrictModel):
    """OpenAI's audio part."""

    type: Literal["input_audio"] = "input_audio"
    input_audio: InputAudio


class AudioUrlPart(StrictModel):
    """vLLM's audio part."""

    type: Literal["audio_url"] = "audio_url"
    audio_url: AudioUrl


class TemplateAudioPart(StrictModel):
    """Qwen2-Audio's own audio part, as its chat template and model card write it."""

    model_config = ConfigDict(json_schema_extra={"required": ["type"]})

    type: Literal["audio"] = "audio"
    audio_url: str | None = None
    audio: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.audio_url is None) == (self.audio is None):
            raise refused("audio_url", "An audio part needs a URL in 'audio_url'.", "missing_required_parameter")
        return self


class UnknownPart(StrictModel):
    """Any other part: always refused, by the name of its type."""

    type: JsonValue = None

    @model_validator(mode="after")
    def _refuse(self) -> Self:
        if self.type is None:
            raise refused("type", "A content part needs a 'type'.", "missing_required_parameter")
        name = repr(self.type[:40]) if isinstance(self.type, str) else "that"
        message = f"Content parts of type {name} are not supported; text, input_audio and audio_url are."
        raise refused("type", message, "invalid_value")


_PART_TAGS = {"text", "input_audio", "audio_url", "audio"}


def _part_tag(part: object) -> str:
    """The part's type, or the key that stands for it where the type is left out (vLLM's clients do so)."""
    if not isinstance(part, Mapping):
        return "<unknown>"
    kind = part.get("type")
    if kind is None:
        kind = next((key for key in ("text", "input_audio", "audio_url") if key in part), None)
    return f"<{kind}>" if isinstance(kind, str) and kind in _PART_TAGS else "<unknown>"


AudioPart = InputAudioPart | AudioUrlPart | TemplateAudioPart
Part = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[InputAudioPart, Tag("<input_audio>")]
    | Annotated[AudioUrlPart, Tag("<audio_url>")]
    | Annotated[TemplateAudioPart, Tag("<audio>")]
    | Annotated[UnknownPart, Tag("<unknown>")],
    Discriminator(_part_tag),
]


def _content_tag(content: object) -> str:
    return "<parts>" if isinstance(content, list) else "<string>"


Content = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[list[Part], Field(min_length=1, max_length=MAX_ITEMS), Tag("<parts>")],
    Discriminator(_content_tag),
]


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
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: (
        Annotated[
            Annotated[StopString, Tag("<string>")]
            | Annotated[list[StopString], Field(min_length=1, max_length=4), Tag("<parts>")],
            Discriminator(_content_tag),
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
    long_audio: LongAudio | None = None
    """Tympan's own: what becomes of audio over 30 s. Omitted: as the server is set."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        check_refused(self.model_extra, self.refusals)
        if self.n is not None and self.n > 1:
            raise refused("n", "Unsupported value: 'n' above 1 is not supported yet.", "unsupported_value")
        if self.stream_options is not None and not self.stream:
            message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
            raise refused("stream_options", message, "invalid_value")
        limit = self.token_limit
        if limit is not None and self.min_tokens is not None and self.min_tokens > limit:
            message = f"Invalid 'min_tokens': it must not be above the token limit of {limit}."
            raise refused("min_tokens", message, "invalid_value")
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
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, however they were written."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    refusals = REFUSED_IN_CHAT

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_ITEMS)]
    max_completion_tokens: Count | None = None
    """Wins over max_tokens, its older name."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

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


AudioInput = Annotated[
    Annotated[InputAudioPart, Tag("<input_audio>")]
    | Annotated[AudioUrlPart, Tag("<audio_url>")]
    | Annotated[TemplateAudioPart, Tag("<audio>")]
    | Annotated[UnknownPart, Tag("<unknown>")],
    Discriminator(lambda part: tag if (tag := _part_tag(part)) != "<text>" else "<unknown>"),
]


class CompletionRequest(GenerationRequest):
    """POST /v1/completions: a raw prompt whose control and placeholder tokens count, with its clips beside it."""

    refusals = REFUSED_IN_COMPLETIONS
    DEFAULT_MAX_TOKENS: ClassVar[int] = 16

    prompt: Annotated[
        Annotated[str, Field(min_length=1), Tag("<string>")]
        | Annotated[list[TokenId], Field(min_length=1), Tag("<parts>")],
        Discriminator(_content_tag),
    ]
    audio: Annotated[list[AudioInput], Field(max_length=MAX_ITEMS)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def token_limit(self) -> int:
        return self.DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs
