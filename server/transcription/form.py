"""The fields of POST /v1/audio/transcriptions and /translations: OpenAI's, and vLLM's extras that have an effect.

Values arrive as text. An empty field equals an omitted one; `name` and `name[]` are one field. What is not honoured
is decided upon in server/requests/parameters.py, as for the other endpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from server.http.body import explain_invalid
from server.requests.parameters import REFUSED_IN_TRANSCRIPTIONS, check_refused, refused
from server.requests.schema import Count, Fraction, Penalty, Seed
from server.transcription.languages import LANGUAGES

Task = Literal["transcribe", "translate"]

GRANULARITIES = "timestamp_granularities[]"
_LISTS = (GRANULARITIES, *(name for name in REFUSED_IN_TRANSCRIPTIONS if name.endswith("[]")))
MAX_PROMPT_CHARS = 8192


class TranscriptionForm(BaseModel):
    """POST /v1/audio/transcriptions, validated, the file aside."""

    model_config = ConfigDict(allow_inf_nan=False, extra="allow", frozen=True, protected_namespaces=())

    task: ClassVar[Task] = "transcribe"

    model: str | None = None
    language: str | None = None
    prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARS)] = ""
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt"] = "json"
    temperature: Fraction = 0.0
    timestamp_granularities: Annotated[list[Literal["segment"]], Field(alias=GRANULARITIES)] = []
    stream: bool = False
    chunking_strategy: Literal["auto"] | None = None
    max_completion_tokens: Count | None = None
    """Of one window."""
    seed: Seed | None = None
    top_p: Fraction = 1.0
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] = 0
    min_p: Fraction = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0

    @field_validator("language")
    @classmethod
    def _known_language(cls, language: str | None) -> str | None:
        if language is not None and (language := language.lower()) not in LANGUAGES:
            raise refused("", "Invalid 'language': expected an ISO-639-1 code such as 'en'.", "invalid_value")
        return language

    @model_validator(mode="before")
    @classmethod
    def _check_refused(cls, fields: dict[str, object]) -> dict[str, object]:
        if fields.get("response_format") == "diarized_json":
            message = "Unsupported value: 'response_format' diarized_json (the model does not tell speakers apart)."
            raise refused("response_format", message, "unsupported_value")
        granularities = fields.get(GRANULARITIES)
        if isinstance(granularities, list) and "word" in granularities:
            message = f"Unsupported value: '{GRANULARITIES}' word (only segments have times)."
            raise refused(GRANULARITIES, message, "unsupported_value")
        return fields

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        check_refused(self.model_extra, REFUSED_IN_TRANSCRIPTIONS)
        if self.timestamp_granularities and self.response_format != "verbose_json":
            message = f"'{GRANULARITIES}' needs the response_format verbose_json."
            raise refused(GRANULARITIES, message, "invalid_value")
        if self.stream and self.response_format not in ("json", "text"):
            message = f"A stream cannot have the response_format {self.response_format}: only json and text can."
            raise refused("response_format", message, "invalid_value")
        if self.stream and self.task == "translate":
            raise refused("stream", "Unsupported parameter: 'stream' (translations have none).")
        return self


class TranslationForm(TranscriptionForm):
    """POST /v1/audio/translations, likewise."""

    task: ClassVar[Task] = "translate"

    stream: Annotated[bool, Field(json_schema_extra={"const": False})] = False


def parse_transcription(model: type[TranscriptionForm], fields: Mapping[str, list[str]]) -> TranscriptionForm:
    """Validate a form's fields. Raises ApiError."""
    given: dict[str, object] = {}
    for sent, values in fields.items():
        name = f"{sent}[]" if f"{sent}[]" in _LISTS else sent
        if kept := [value for value in values if value]:
            given[name] = kept if name in _LISTS else kept[-1]
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise explain_invalid(error) from None
