"""The OpenAPI document: what every route takes and answers, made from the routes and their pydantic models.

A route says what it is where it is declared (`openapi_extra=describe(body=…, answer=…)`); everything that follows
from that is worked out here: the error statuses that a body, a form or a query bring, the envelope, the key. FastAPI
would make a document of its own from the handlers' signatures, which say nothing: they take the request as it comes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from server.api.answers import ErrorAnswer

Model = type[BaseModel]
Json = dict[str, Any]

EVENTS = "text/event-stream"
TEXT = "text/plain"
BODY_STATUSES = (400, 408, 413, 415, 429)
EVERYWHERE_STATUSES = (431, 500, 503)
API_VERSION = "1"
DETAILS = "operation"
"""Where a route carries its description."""
_OTHER_SCHEMAS: Mapping[str, Json] = {
    "application/json": {},
    EVENTS: {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]},
}
"""Of media types that are no text; of an event stream, each event's."""
REFUSED_TAG = "<unknown>"
"""server/requests/schema.py's for content parts of any other type."""

_PATH_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")


@dataclass(frozen=True, slots=True)
class Operation:
    """What a route takes and answers."""

    body: Model | None = None
    """JSON."""
    form: Model | None = None
    """multipart/form-data, a `file` beside its fields."""
    query: Model | None = None
    answer: Model | None = None
    """The JSON of a 200."""
    media_types: tuple[str, ...] = ()
    """Other types that a 200 may have: text, or JSON of no model."""
    errors: tuple[int, ...] = ()
    """Beside those that follow from the rest."""
    is_open: bool = False
    """A probe: no key, and an empty body whatever the status."""
    is_refused: bool = False
    """There is no 200."""


def describe(**details: Any) -> dict[str, Any]:
    """A route's `openapi_extra`. The details are those of Operation."""
    return {DETAILS: Operation(**details)}


def operations(routes: Iterable[Any]) -> Iterator[tuple[APIRoute, Operation]]:
    """The routes that describe themselves."""
    for route in routes:
        if isinstance(route, APIRoute) and route.openapi_extra and DETAILS in route.openapi_extra:
            yield route, route.openapi_extra[DETAILS]


def make_document(routes: Iterable[Any], *, has_keys: bool) -> Json:
    """The whole document, of OpenAPI 3.1."""
    described = list(operations(routes))
    schemas = _Schemas(operation for _, operation in described)
    paths: dict[str, Json] = {}
    for route, operation in described:
        path = _PATH_PARAMETER.sub(r"{\1}", route.path)
        for method in sorted(route.methods or ()):
            paths.setdefault(path, {})[method.lower()] = _operation(route, method, operation, schemas, has_keys)
    components: Json = {"schemas": schemas.definitions}
    if has_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tympan", "version": API_VERSION},
        "paths": paths,
        "components": components,
    }


class _Generator(GenerateJsonSchema):
    """Unions by tag, as readers of the schema must see them.

    The branch that is always refused is left out; and what is without its type fits one branch for us, but may fit
    two for them.
    """

    def tagged_union_schema(self, schema: core_schema.TaggedUnionSchema) -> JsonSchemaValue:
        choices = {tag: choice for tag, choice in schema["choices"].items() if tag != REFUSED_TAG}
        union = super().tagged_union_schema({**schema, "choices": choices})
        return {"anyOf" if key == "oneOf" else key: value for key, value in union.items()}


class _Schemas:
    """The models of all operations, each once."""

    def __init__(self, described: Iterable[Operation]) -> None:
        inputs: set[Model] = set()
        outputs: set[Model] = {ErrorAnswer}
        for operation in described:
            inputs |= {model for model in (operation.body, operation.form, operation.query) if model}
            outputs |= {model for model in (operation.answer,) if model}
        wanted: list[tuple[Model, JsonSchemaMode]] = [
            *((model, "validation") for model in sorted(inputs, key=str)),
            *((model, "serialization") for model in sorted(outputs, key=str)),
        ]
        self._by_model, whole = models_json_schema(
            wanted, ref_template="#/components/schemas/{model}", schema_generator=_Generator
        )
        text = json.dumps([*self._by_model.values(), whole["$defs"]])
        self.definitions: Json = {
            name: schema for name, schema in whole["$defs"].items() if f'schemas/{name}"' in text
        }

    def reference(self, model: Model, mode: JsonSchemaMode) -> Json:
        """A pointer to the model's schema."""
        return self._by_model[model, mode]

    def resolved(self, model: Model) -> Json:
        """The schema itself, of a model that is taken apart."""
        name = self.reference(model, "validation")["$ref"].rpartition("/")[2]
        resolved: Json = self.definitions[name]
        return resolved


def _operation(route: APIRoute, method: str, operation: Operation, schemas: _Schemas, has_keys: bool) -> Json:
    words = _PATH_PARAMETER.sub(r"\1", route.path).strip("/").replace("/", "_").replace(".", "_")
    described: Json = {
        "operationId": f"{method.lower()}_{words}",
        "summary": (route.endpoint.__doc__ or "").strip().splitlines()[0],
        "responses": _responses(operation, schemas, has_keys),
    }
    if parameters := [*_path_parameters(route), *_query_parameters(operation, schemas)]:
        described["parameters"] = parameters
    if operation.body:
        content = {"application/json": {"schema": schemas.reference(operation.body, "validation")}}
        described["requestBody"] = {"required": True, "content": content}
    if operation.form:
        content = {"multipart/form-data": {"schema": _form(schemas.resolved(operation.form))}}
        described["requestBody"] = {"required": True, "content": content}
    if has_keys and not operation.is_open:
        described["security"] = [{"key": []}]
    return described


def _path_parameters(route: APIRoute) -> Iterator[Json]:
    for name in _PATH_PARAMETER.findall(route.path):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _query_parameters(operation: Operation, schemas: _Schemas) -> Iterator[Json]:
    if operation.query:
        for name, schema in schemas.resolved(operation.query)["properties"].items():
            yield {"name": name, "in": "query", "required": False, "schema": schema}


def _form(schema: Json) -> Json:
    file = {"type": "string", "format": "binary"}
    return {
        **schema,
        "properties": {**schema["properties"], "file": file},
        "required": [*schema.get("required", ()), "file"],
    }


def _responses(operation: Operation, schemas: _Schemas, has_keys: bool) -> Json:
    responses: Json = {}
    if operation.is_open:
        return {"200": {"description": "Yes."}, "503": {"description": "No."}}
    if not operation.is_refused:
        responses["200"] = {"description": "The answer.", "content": dict(_contents(operation, schemas))}
    statuses = {*operation.errors, *EVERYWHERE_STATUSES}
    if operation.body or operation.form:
        statuses |= {*BODY_STATUSES}
    if operation.query:
        statuses.add(400)
    if has_keys:
        statuses.add(401)
    error = {"application/json": {"schema": schemas.reference(ErrorAnswer, "serialization")}}
    for status in sorted(statuses):
        responses[str(status)] = {"description": HTTPStatus(status).phrase, "content": error}
    return responses


def _contents(operation: Operation, schemas: _Schemas) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if operation.answer:
        yield "application/json", {"schema": schemas.reference(operation.answer, "serialization")}
    for media_type in operation.media_types:
        yield media_type, {"schema": _OTHER_SCHEMAS.get(media_type, {"type": "string"})}
