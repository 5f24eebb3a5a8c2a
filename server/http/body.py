"""From the bytes of a request to a validated model, in bounded memory.

The body is counted while it is read, so that an endless upload is refused at the cap. Joining and parsing run in a
worker thread: a body may hold tens of megabytes of base64, of which one copy is made, as the parser holds the GIL
meanwhile. What pydantic finds becomes OpenAI's error; the offending input is never repeated, but for a number that
is out of range.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json
from starlette.requests import Request

from server.errors import ApiError, bad_request
from server.requests.parameters import REFUSED

ModelT = TypeVar("ModelT", bound=BaseModel)

MAX_SHOWN_CHARS = 100
"""Of a parameter's path or a number in a message."""
MAX_JSON_VALUES = 300_000
"""Of a body, about: parsed, a value takes hundreds of bytes for the two that it has here. Base64 holds none."""
MAX_JSON_OBJECTS = 50_000
"""Of a body, about: validated, each is worth twenty other values."""

_TYPE_NAMES = {
    "bool": "a boolean",
    "dict": "an object",
    "float": "a number",
    "int": "an integer",
    "list": "an array",
    "model": "an object",
    "string": "a string",
}
_BOUNDS = {
    "greater_than": ("below_min_value", "below minimum", ">", "gt"),
    "greater_than_equal": ("below_min_value", "below minimum", ">=", "ge"),
    "less_than": ("above_max_value", "above maximum", "<", "lt"),
    "less_than_equal": ("above_max_value", "above maximum", "<=", "le"),
}


async def parse_body(request: Request, model: type[ModelT], max_bytes: int) -> ModelT:
    """Read and validate a JSON body.

    Raises ApiError: 413 above `max_bytes`, 415 for another content type, 400 for what is not valid.
    """
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(415, "The Content-Type header must be application/json.")
    chunks = await _read(request, max_bytes)
    try:
        return await asyncio.to_thread(validate_json, model, chunks)
    except ValidationError as error:
        raise explain_invalid(error) from None


def parse_text_values(model: type[ModelT], values: Mapping[str, str]) -> ModelT:
    """Validate what can only be text: the fields of a form, or a query. Raises ApiError (400)."""
    try:
        return model.model_validate_strings(values)
    except ValidationError as error:
        raise explain_invalid(error) from None


def validate_json(model: type[ModelT], chunks: list[bytes]) -> ModelT:
    """The body that `chunks` make together, which are given up. Blocking. Raises ApiError, ValidationError."""
    num_objects = sum(chunk.count(b"{") for chunk in chunks)
    num_values = num_objects + sum(chunk.count(sign) for chunk in chunks for sign in (b",", b"["))
    if num_values > MAX_JSON_VALUES or num_objects > MAX_JSON_OBJECTS:
        raise ApiError(413, "The request body holds too many values.", code="request_too_large")
    body = b"".join(chunks)
    chunks.clear()  # half of the memory that is held while parsing
    try:
        # Not model_validate_json: each union that looks at a part before it chooses would copy the part's clip.
        values = from_json(body)
    except ValueError as error:
        if "recursion limit" in str(error):
            raise bad_request("The JSON body is nested too deeply.", code="json_too_deep") from None
        raise _unparsable() from None
    return model.model_validate(values)


async def _read(request: Request, max_bytes: int) -> list[bytes]:
    check_declared_size(request, max_bytes)
    chunks: list[bytes] = []
    num_bytes = 0
    async for chunk in request.stream():
        chunks.append(chunk)
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise too_large(max_bytes)
    return chunks


def check_declared_size(request: Request, max_bytes: int) -> None:
    """Raise ApiError (413) when the request says itself that it is too large: not a byte of it need be read."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise too_large(max_bytes)


def too_large(max_bytes: int, what: str = "The request body is") -> ApiError:
    """A 413 that also ends the connection: what else comes is not read."""
    message = f"{what} too large: at most {max_bytes} bytes are accepted."
    return ApiError(413, message, code="request_too_large", headers={"Connection": "close"})


def explain_invalid(error: ValidationError) -> ApiError:
    """The first problem found, as OpenAI words it."""
    details = error.errors(include_url=False)[0]
    kind, ctx = details["type"], details.get("ctx", {})
    param = _path(details["loc"])
    if kind == REFUSED:
        return bad_request(ctx["message"], ".".join(filter(None, (param, ctx["param"]))), ctx["code"])
    if not param:
        return _unparsable()
    if kind == "missing":
        return bad_request(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")
    if kind in _BOUNDS:
        return _out_of_range(param, details)
    if kind in ("too_short", "too_long", "string_too_short", "string_too_long"):
        return _wrong_length(param, kind, ctx)
    if kind in ("literal_error", "enum"):
        return bad_request(f"Invalid value for '{param}': expected {ctx['expected']}.", param, "invalid_value")
    if kind == "finite_number":
        return bad_request(f"Invalid '{param}': expected a finite number.", param, "invalid_value")
    if (name := _TYPE_NAMES.get(kind.split("_")[0])) and (kind.endswith("_type") or kind == "int_from_float"):
        return bad_request(f"Invalid type for '{param}': expected {name}.", param, "invalid_type")
    return bad_request(f"Invalid value for '{param}'.", param, "invalid_value")


def _unparsable() -> ApiError:
    hint = "the body must be one JSON object in UTF-8"
    return bad_request(f"We could not parse the JSON body of your request. (HINT: {hint}.)")


def _path(loc: Sequence[int | str]) -> str:
    """`messages[0].content[1].text`. Tags of unions are written `<so>` in the schema and left out here."""
    path = ""
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith("<"):
            path += f".{step}" if path else step
    return path[:MAX_SHOWN_CHARS]


def _out_of_range(param: str, details: ErrorDetails) -> ApiError:
    value = details["input"]
    code, words, sign, key = _BOUNDS[details["type"]]
    bound = details["ctx"][key]
    number = "integer" if isinstance(bound if isinstance(value, str) else value, int) else "decimal"
    limit = f"{bound:g}" if isinstance(bound, float) else str(bound)
    expected = f"Expected a value {sign} {limit}, but got {str(value)[:MAX_SHOWN_CHARS]} instead."
    return bad_request(f"Invalid '{param}': {number} {words} value. {expected}", param, f"{number}_{code}")


def _wrong_length(param: str, kind: str, ctx: Mapping[str, Any]) -> ApiError:
    thing, unit = ("string", "characters") if kind.startswith("string") else ("array", "items")
    if kind.endswith("short"):
        return bad_request(f"Invalid '{param}': empty {thing}.", param, f"empty_{thing}")
    message = f"Invalid '{param}': {thing} too long. At most {ctx['max_length']} {unit} are accepted."
    return bad_request(message, param, f"{thing}_above_max_length")
