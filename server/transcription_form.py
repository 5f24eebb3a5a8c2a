"""The fields of POST /v1/audio/transcriptions and /translations: OpenAI's, and vLLM's extras that have an effect.

Values arrive as text. An empty field equals an omitted one; `name` and `name[]` are one field. What is not honoured
is decided upon in server/parameters.py, as for the other endpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from server.body import explain_invalid
from server.languages import LANGUAGES
from server.parameters import REFUSED_IN_TRANSCRIPTIONS, check_refused, refused
from server.schema import Count, Fraction, Penalty

Task = Literal["transcribe", "translate"]

_LISTS = ("timestamp_granularities", "include")
MAX_PROMPT_CHARS = 8192


class TranscriptionForm(BaseModel):
    """A validated form, its file aside."""

    model_config = ConfigDict(allow_inf_nan=False, extra="allow", frozen=True, protected_namespaces=())

    task: Task
    model: str | None = None
    language: str | None = None
    prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARS)] = ""
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt"] = "json"
    temperature: Fraction = 0.0
    timestamp_granularities: list[Literal["segment"]] = []
    include: list[str] = []
    stream: bool = False
    chunking_strategy: Literal["auto"] | None = None
    max_completion_tokens: Count | None = None
    """Of one window."""
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
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
        granularities = fields.get("timestamp_granularities")
        if isinstance(granularities, list) and "word" in granularities:
            message = "Unsupported value: 'timestamp_granularities[]' word (only segments have times)."
            raise refused("timestamp_granularities[]", message, "unsupported_value")
        if fields.get("include"):
            message = "Unsupported parameter: 'include[]' (nothing more than the text can be included)."
            raise refused("include[]", message, "unsupported_parameter")
        return fields

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        check_refused(self.model_extra, REFUSED_IN_TRANSCRIPTIONS)
        if self.timestamp_granularities and self.response_format != "verbose_json":
            message = "'timestamp_granularities[]' needs the response_format verbose_json."
            raise refused("timestamp_granularities[]", message, "invalid_value")
        if self.stream and self.response_format not in ("json", "text"):
            message = f"A stream cannot have the response_format {self.response_format}: only json and text can."
            raise refused("response_format", message, "invalid_value")
        if self.stream and self.task == "translate":
            raise refused("stream", "Unsupported parameter: 'stream' (translations have none).")
        return self


def parse_transcription(fields: Mapping[str, list[str]], task: Task) -> TranscriptionForm:
    """Validate a form's fields. Raises ApiError."""
    given: dict[str, object] = {}
    for sent, values in fields.items():
        name = sent.removesuffix("[]") if sent.removesuffix("[]") in _LISTS else sent
        if kept := [value for value in values if value]:
            given[name] = kept if name in _LISTS else kept[-1]
    try:
        return TranscriptionForm.model_validate({**given, "task": task})
    except ValidationError as error:
        raise explain_invalid(error) from None
