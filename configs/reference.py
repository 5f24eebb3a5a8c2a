"""docs/configuration.md, made from the settings: `python -m configs.reference > docs/configuration.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from configs.settings import ENV_PREFIX, Settings, group_of, metavar_of

HEAD = """# Settings

<!-- Made by `python -m configs.reference > docs/configuration.md`, as a test checks: change configs/settings.py. -->

Every setting is a flag of `tympan serve` (or `python -m server`), an environment variable, and a key of the YAML
file that `--config FILE` or `{prefix}CONFIG` names (`max-model-len` or `max_model_len`). The command line wins over
the environment, the environment over the file. An unknown flag or key is an error; unknown `{prefix}…` variables are
not, since orchestrators set some. Switches are `--name` and `--no-name`, in the environment and in files `true` and
`false`. Lists are several words on the command line, `a,b` in the environment, lists in YAML. What does not fit
ends the server at its start with status 2 and one sentence.

`configs/` holds ready files: the bundled checkpoint, Qwen2-Audio-7B-Instruct (also in float8) and the base model.
"""
HEADINGS = {
    "model": "The model",
    "engine": "The engine",
    "server": "The server",
    "audio": "Audio",
}
_BOUNDS = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}
_KINDS = {str: "text", int: "integer", float: "number"}


def settings_page() -> str:
    """Markdown: a table for each group."""
    lines = [HEAD.format(prefix=ENV_PREFIX)]
    for group in dict.fromkeys(group_of(field) for field in Settings.model_fields.values()):
        lines += [f"## {HEADINGS[group]}", "", "| Setting | Values | Default | Meaning |"]
        lines.append("| --- | --- | --- | --- |")
        fields = Settings.model_fields.items()
        lines += [_row(name, field) for name, field in fields if group_of(field) == group]
        lines.append("")
    return "\n".join(lines)


def _row(name: str, field: FieldInfo) -> str:
    meaning, _, default = (field.description or "").partition("default: ")
    shown = default or _shown(field.default)
    cells = (
        f"`--{name.replace('_', '-')}`<br>`{ENV_PREFIX}{name.upper()}`",
        ", ".join(_values(field)),
        shown,
        meaning.rstrip("; ") + ".",
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, dict):
        return "`" + ",".join(f"{key}={value}" for key, value in default.items()) + "`"
    return "none" if default in (None, ()) else f"`{default}`"


def _values(field: FieldInfo) -> Iterator[str]:
    kinds = [field.annotation, *get_args(field.annotation)]
    choices = next((kind for kind in kinds if get_origin(kind) is Literal), None)
    if bool in kinds:
        yield "switch"
    elif metavar_of(field):
        repeated = ", repeatable" if isinstance(field.default, tuple) else ""
        yield f"`{metavar_of(field)}`{repeated}"
    elif choices:
        yield ", ".join(f"`{choice}`" for choice in get_args(choices))
    else:
        yield next((word for kind, word in _KINDS.items() if kind in kinds), "text")
    for limit in field.metadata:
        for kind, (sign, attribute) in _BOUNDS.items():
            if isinstance(limit, kind):
                yield f"{sign} {getattr(limit, attribute):,}".replace(f"{2**63:,}", "2⁶³")


if __name__ == "__main__":
    sys.stdout.write(settings_page())
