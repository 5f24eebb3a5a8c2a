"""The page of every route and field, made from the OpenAPI document that the server answers with.

What a field means stands in docs/api.md, whose tests hold it against the same models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from server.api.openapi import make_document
from server.api.routes import router

Json = Mapping[str, Any]
HEAD = """# Every field

Made from the schema that the server checks requests by, when this page is built; `GET /openapi.json` has the same
for programs. [The API](api.md) says what fields mean. A field that is not required may be `null`.
"""
_LIMITS = {
    "minimum": "≥ {}",
    "maximum": "≤ {}",
    "minLength": "≥ {} characters",
    "maxLength": "≤ {} characters",
    "minItems": "≥ {} items",
    "maxItems": "≤ {} items",
    "maxProperties": "≤ {} entries",
}
_POWERS = {2**31 - 1: "2³¹ - 1", 2**63 - 1: "2⁶³ - 1", -(2**63): "-2⁶³"}


def fields_page() -> str:
    """Markdown: the routes, then the fields of every body, form, query and part of these."""
    document = make_document(router.routes, has_keys=True)
    schemas = document["components"]["schemas"]
    lines = [HEAD, "## Routes", "", "| Route | | Takes |", "| --- | --- | --- |"]
    wanted: dict[str, Json] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            takes = _taken(method.upper(), path, operation, schemas, wanted)
            lines.append(f"| `{method.upper()} {path}` | {operation['summary']} | {takes} |")
    for name in _reachable(list(wanted.values()), schemas):
        wanted.setdefault(name, schemas[name])
    for name, schema in wanted.items():
        lines += ["", f"## {name}", "", *_table(schema)]
    return "\n".join(lines) + "\n"


def _taken(method: str, path: str, operation: Json, schemas: Json, wanted: dict[str, Json]) -> str:
    """A link to what a route takes; what that is goes to the wanted."""
    if query := [field for field in operation.get("parameters", ()) if field["in"] == "query"]:
        name = f"The query of {method} {path}"
        wanted[name] = {"properties": {field["name"]: field["schema"] for field in query}}
        return _link(name)
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        reference = content["schema"].get("$ref", "")
        name = _name_of(reference) if reference else f"The form of {path}"
        wanted[name] = schemas[name] if reference else content["schema"]
        return f"{_link(name)}, `{kind}`"
    return ""


def _reachable(found: list[Json], schemas: Json) -> Iterator[str]:
    """Names of the models in these schemas, and in those, each once."""
    seen: set[str] = set()
    while found:
        node: Any = found.pop(0)
        if isinstance(node, list):
            found[:0] = node
        elif isinstance(node, dict):
            name = _name_of(str(node.get("$ref", "")))
            if name and name not in seen and schemas[name].get("properties"):
                seen.add(name)
                yield name
                found.append(schemas[name])
            found[:0] = [value for key, value in node.items() if key != "default"]


def _table(schema: Json) -> Iterator[str]:
    yield "| Field | Type | |"
    yield "| --- | --- | --- |"
    required = schema.get("required", ())
    for name, field in schema["properties"].items():
        default = field.get("default")
        note = "required" if name in required else "" if default in (None, "", []) else f"default: `{default}`"
        yield f"| `{name}` | {_type(field)} | {note} |"


def _type(field: Json) -> str:
    """A schema in words."""
    if "$ref" in field:
        name = _name_of(field["$ref"])
        return "any JSON" if name == "JsonValue" else _link(name)
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    branches = [_type(branch) for branch in field.get("anyOf", ()) if branch.get("type") != "null"]
    if branches:
        return " or ".join(branches)
    kind = field.get("type", "anything")
    if kind == "array" and "items" in field:
        kind = f"list of {_type(field['items'])}"
    elif kind == "object" and isinstance(field.get("additionalProperties"), dict):
        kind = f"object of {_type(field['additionalProperties'])}"
    elif field.get("format") == "binary":
        kind = "a file"
    limits = [text.format(_POWERS.get(field[key], field[key])) for key, text in _LIMITS.items() if key in field]
    return ", ".join([kind, *limits])


def _name_of(reference: str) -> str:
    return reference.rpartition("/")[2]


def _link(name: str) -> str:
    anchor = "".join(char for char in name.lower() if char.isalnum() or char in "-_ ").replace(" ", "-")
    return f"[{name}](#{anchor})"
