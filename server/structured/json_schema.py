"""Which JSON schemas can be honoured: a walk over the keywords before the schema is compiled.

The compiler passes keywords over that it does not know, so this names them instead: a keyword is enforced, an
annotation, or refused. Values of enforced keywords are the compiler's business, but for those that would cost it
too much or that it gets wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from server.errors import ApiError, bad_request

MAX_DEPTH = 64
"""Of schemas within schemas, and of their JSON."""
MAX_MULTIPLE_OF = 1000
"""The compiler counts remainders: its time grows with the square."""

_ENFORCED = {
    *("type", "enum", "const", "anyOf", "allOf", "oneOf", "$ref"),
    *("items", "prefixItems", "additionalItems", "minItems", "maxItems"),
    *("properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties"),
    *("minLength", "maxLength", "pattern", "format"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
_ANNOTATIONS = {
    *("title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly"),
    *("$comment", "$schema", "$id", "$defs", "definitions", "discriminator"),
}
_ONE_SCHEMA = ("items", "additionalItems", "additionalProperties")
_LIST_OF_SCHEMAS = ("anyOf", "allOf", "oneOf", "prefixItems", "items")
_MAP_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_UNSAYABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
"""JSON needs a numbered escape for them, which answers do not use (see server/structured/worker.py)."""


def check_json_schema(schema: object, param: str) -> None:
    """Raise ApiError, a 400 with `param`, for the first thing found that would not be enforced."""
    draft = schema.get("$schema") if isinstance(schema, dict) else None
    has_prefixes = draft is None or "2020-12" in str(draft)
    pending: list[tuple[object, str, int]] = [(schema, "", 0)]
    while pending:
        node, path, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise _invalid(param, f"it is nested more than {MAX_DEPTH} levels deep")
        if isinstance(node, bool):
            continue
        if not isinstance(node, dict):
            raise _invalid(param, f"expected a schema{_at(path)}")
        if "prefixItems" in node and not has_prefixes:
            raise _invalid(param, f"the keyword 'prefixItems'{_at(path)} is not known to the draft in $schema")
        _check_keywords(node, path, param)
        pending += [(child, name, depth + 1) for child, name in _children(node, path)]


def _check_keywords(node: dict[str, Any], path: str, param: str) -> None:
    for keyword, value in node.items():
        if keyword not in _ENFORCED and keyword not in _ANNOTATIONS:
            raise _invalid(param, f"the keyword '{keyword[:40]}'{_at(path)} is not supported")
        if keyword == "multipleOf" and not (isinstance(value, int | float) and 0 < value <= MAX_MULTIPLE_OF):
            raise _invalid(param, f"multipleOf{_at(path)} must be above 0 and at most {MAX_MULTIPLE_OF}")
        if keyword == "$schema" and path:
            raise _invalid(param, f"$schema{_at(path)} is only supported at the top")
        if keyword == "prefixItems" and ("additionalItems" in node or isinstance(node.get("items"), list)):
            raise _invalid(param, f"prefixItems{_at(path)} is not supported beside what older drafts had instead")
        if any(_UNSAYABLE.search(text) for text in _literals(keyword, value)):
            raise _invalid(param, f"{keyword}{_at(path)} holds a control character, which no answer can hold")
        if keyword == "minProperties" and value not in (0, 1):
            raise _invalid(param, f"minProperties{_at(path)} above 1 is not supported")


def _literals(keyword: str, value: object) -> Iterator[str]:
    """All texts that a keyword puts into answers."""
    if keyword == "properties" and isinstance(value, dict):
        yield from value
    pending = [value] if keyword in ("enum", "const", "required") else []
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, list):
            pending += item
        elif isinstance(item, dict):
            pending += [*item, *item.values()]


def _children(node: dict[str, Any], path: str) -> Iterator[tuple[object, str]]:
    for keyword, value in node.items():
        if keyword in _MAP_OF_SCHEMAS and isinstance(value, dict):
            yield from ((child, f"{path}/{keyword}/{name}") for name, child in value.items())
        elif keyword in _LIST_OF_SCHEMAS and isinstance(value, list):
            yield from ((child, f"{path}/{keyword}/{index}") for index, child in enumerate(value))
        elif keyword in _ONE_SCHEMA:
            yield value, f"{path}/{keyword}"


def _at(path: str) -> str:
    return f" at {path[:100]}" if path else ""


def _invalid(param: str, reason: str) -> ApiError:
    return bad_request(f"Invalid '{param}': {reason}.", param, "invalid_json_schema")
