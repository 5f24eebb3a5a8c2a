"""What an answer must look like, as requests say it: OpenAI's `response_format`, vLLM's `structured_outputs`.

A request has one constraint at most. What is said twice, or not at all where something must be said, is refused
here; whether it can be compiled is server/structured/compiler.py's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, JsonValue, Tag, model_validator

from server.requests.parameters import refused
from server.requests.strict_model import StrictModel


def _schema_tag(value: object) -> str:
    return "<bool>" if isinstance(value, bool) else "<string>" if isinstance(value, str) else "<object>"


_Object = Annotated[dict[str, JsonValue], Tag("<object>")]
_Bool = Annotated[bool, Tag("<bool>")]
SchemaValue = Annotated[_Object | _Bool, Discriminator(_schema_tag)]
SchemaOrText = Annotated[_Object | _Bool | Annotated[str, Tag("<string>")], Discriminator(_schema_tag)]


class TextFormat(StrictModel):
    type: Literal["text"]


class JsonObjectFormat(StrictModel):
    type: Literal["json_object"]


class NamedSchema(StrictModel):
    """Name and description tell clients apart what they asked for; the model is not shown them."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[SchemaValue, Field(alias="schema")]
    strict: bool | None = None
    """Without effect: a schema is always enforced."""


class JsonSchemaFormat(StrictModel):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class UnknownFormat(StrictModel):
    """Any other format: always refused, by the name of its type."""

    type: JsonValue = None

    @model_validator(mode="after")
    def _refuse(self) -> Self:
        if self.type is None:
            raise refused("type", "A response_format needs a 'type'.", "missing_required_parameter")
        name = repr(self.type[:40]) if isinstance(self.type, str) else "that"
        message = f"The response format {name} is not supported; text, json_object and json_schema are."
        raise refused("type", message, "invalid_value")


def _format_tag(value: object) -> str:
    kind = value.get("type") if isinstance(value, Mapping) else None
    return f"<{kind}>" if kind in ("text", "json_object", "json_schema") else "<unknown>"


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")]
    | Annotated[UnknownFormat, Tag("<unknown>")],
    Discriminator(_format_tag),
]


class StructuredOutputs(StrictModel):
    """Exactly one of the fields."""

    model_config = ConfigDict(extra="allow")

    json_: Annotated[SchemaOrText | None, Field(alias="json")] = None
    """A schema, or its JSON text."""
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if value not in (None, False):
                message = f"Unsupported parameter: '{name[:40]}' (structured_outputs cannot be adjusted by it)."
                raise refused(name[:40], message)
        given = [name for name, value in self._fields().items() if value is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            message = (
                "structured_outputs takes exactly one of json, regex, choice, grammar and json_object; "
                f"this one has {found}."
            )
            raise refused("", message, "invalid_value")
        return self

    def _fields(self) -> Mapping[str, object]:
        return {
            "json": self.json_,
            "regex": self.regex,
            "choice": self.choice,
            "grammar": self.grammar,
            "json_object": self.json_object or None,
        }
