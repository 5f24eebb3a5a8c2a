"""From the bytes of a request to a validated model, in bounded memory.

The body is counted while it is read, so that an endless upload is refused at the cap; what it holds of memory and
disk is counted for all requests together. Parsing runs in a worker thread, of a body without its long strings
(server/http/json_body.py), as the parser holds the GIL meanwhile. What pydantic finds becomes OpenAI's error; the
offending input is never repeated, but for a number that is out of range.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from server.access.held_bytes import HeldBytes, overloaded
from server.errors import ApiError, bad_request
from server.http.json_body import JsonReader, unparsable
from server.requests.parameters import REFUSED

ModelT = TypeVar("ModelT", bound=BaseModel)

MAX_SHOWN_CHARS = 100
"""Of a parameter's path or a number in a message."""

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

    Raises ApiError: 413 above `max_bytes`, 415 for another content type or encoding, 400 for what is not valid.
    """
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(415, "The Content-Type header must be application/json.")
    check_not_encoded(request)
    held: HeldBytes = request.state.held
    reader = await _read(request, max_bytes, held)
    # Parsing holds the GIL: side by side, large bodies would only take more memory.
    async with nullcontext() if reader.is_small else held.parsing:
        try:
            validated = await asyncio.to_thread(validate_json, model, reader)
        except ValidationError as error:
            raise explain_invalid(error) from None
        held.hold(memory=reader.num_memory_bytes, disk=reader.num_disk_bytes)
    return validated


def parse_text_values(model: type[ModelT], values: Mapping[str, str]) -> ModelT:
    """Validate what can only be text: the fields of a form, or a query. Raises ApiError (400)."""
    try:
        return model.model_validate_strings(values)
    except ValidationError as error:
        raise explain_invalid(error) from None


def validate_json(model: type[ModelT], reader: JsonReader) -> ModelT:
    """The body that `reader` has taken. Blocking. Raises ApiError, ValidationError."""
    return model.model_validate(reader.values())


async def _read(request: Request, max_bytes: int, held: HeldBytes) -> JsonReader:
    check_declared_size(request, max_bytes)
    reader = JsonReader()
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise too_large(max_bytes)
        with refused_when_full():
            if reader.num_disk_bytes:  # which may have to be waited for
                await asyncio.to_thread(reader.write, chunk)
            else:
                reader.write(chunk)
        held.hold(memory=reader.num_memory_bytes, disk=reader.num_disk_bytes)
    return reader


@contextmanager
def refused_when_full() -> Iterator[None]:
    """Round what writes to the disk. Raises ApiError (503) for its OSError."""
    try:
        yield
    except OSError:
        raise overloaded("The server is full: its disk has no room for the body of this request.") from None


def check_not_encoded(request: Request) -> None:
    """Raise ApiError (415) for a compressed body: a kilobyte of it may be a gigabyte."""
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise ApiError(415, "A request body must not be compressed: leave the Content-Encoding header out.")


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
        return unparsable()
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
