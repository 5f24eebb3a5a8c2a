"""What a user's message is made of: text and audio, in OpenAI's, vLLM's and Qwen2-Audio's own spelling.

Shapes only: server/media/loader.py hears the audio. Tags of unions are written `<so>`, as in schema.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, GetPydanticSchema, JsonValue, Tag, model_validator
from pydantic_core.core_schema import ValidatorFunctionWrapHandler, no_info_wrap_validator_function

from audio import FiledText, Text
from server.requests.parameters import refused
from server.requests.strict_model import MAX_ITEMS, StrictModel
from server.requests.text_content import TextPart


def _unless_filed(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    return value if isinstance(value, FiledText) else validate(value)


AudioText = Annotated[
    Text, GetPydanticSchema(lambda _, make: no_info_wrap_validator_function(_unless_filed, make(str)))
]
"""A string, or what was put aside of one while the body was read (server/http/json_body.py)."""


class InputAudio(StrictModel):
    """Audio inside the request, or uploaded before it."""

    data: AudioText | None = None
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

    url: AudioText
    """http:, https: or data:; file: where the server reads local files."""


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
    audio_url: AudioText | None = None
    audio: AudioText | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.audio_url is None) == (self.audio is None):
            raise refused("audio_url", "An audio part needs a URL in 'audio_url'.", "missing_required_parameter")
        return self


class UnknownPart(StrictModel):
    """Any other part: always refused, by the name of its type."""

    supported: ClassVar[str] = "text, input_audio and audio_url"
    type: JsonValue = None

    @model_validator(mode="after")
    def _refuse(self) -> Self:
        if self.type is None:
            raise refused("type", "A content part needs a 'type'.", "missing_required_parameter")
        name = repr(self.type[:40]) if isinstance(self.type, str) else "that"
        message = f"Content parts of type {name} are not supported; {self.supported} are."
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


def content_tag(content: object) -> str:
    """Of what is a text or a list."""
    return "<parts>" if isinstance(content, list) else "<string>"


Content = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[list[Part], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True), Tag("<parts>")],
    Discriminator(content_tag),
]

AudioInput = Annotated[
    Annotated[InputAudioPart, Tag("<input_audio>")]
    | Annotated[AudioUrlPart, Tag("<audio_url>")]
    | Annotated[TemplateAudioPart, Tag("<audio>")]
    | Annotated[UnknownPart, Tag("<unknown>")],
    Discriminator(lambda part: tag if (tag := _part_tag(part)) != "<text>" else "<unknown>"),
]
