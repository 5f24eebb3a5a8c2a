"""Content that is text: a string, or a list of text parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, JsonValue, Tag, model_validator

from server.requests.parameters import refused
from server.requests.strict_model import MAX_ITEMS, StrictModel


class TextPart(StrictModel):
    type: Literal["text"] = "text"
    text: str


class NoTextPart(StrictModel):
    """Any other part: always refused."""

    type: JsonValue = None

    @model_validator(mode="after")
    def _refuse(self) -> Self:
        raise refused("type", "Only content parts of type text are supported in this message.", "invalid_value")


def _part_tag(part: object) -> str:
    is_text = isinstance(part, Mapping) and part.get("type", "text") == "text" and "text" in part
    return "<text>" if is_text else "<other>"


def _content_tag(content: object) -> str:
    return "<parts>" if isinstance(content, list) else "<string>"


_TextParts = list[
    Annotated[
        Annotated[TextPart, Tag("<text>")] | Annotated[NoTextPart, Tag("<other>")],
        Discriminator(_part_tag),
    ]
]
TextContent = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[_TextParts, Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True), Tag("<parts>")],
    Discriminator(_content_tag),
]


def texts_of(content: str | list[TextPart | NoTextPart] | None) -> str | tuple[str, ...]:
    """The content as turns have it."""
    if content is None or isinstance(content, str):
        return content or ""
    return tuple(part.text for part in content if isinstance(part, TextPart))
