"""Where settings come from: command line > environment > YAML file > default. An unknown name is an error.

The argument parser is made from the settings' fields, so that there is one list of them. It only says which
values were given; types and ranges are checked by the settings, whatever the source.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from configs.settings import ENV_PREFIX, Settings, group_of, metavar_of

DESCRIPTION = "Serve a Qwen2-Audio checkpoint over OpenAI's API. With no arguments: the small one that is bundled."
EPILOG = (
    f"Each flag is also an environment variable ({ENV_PREFIX}MAX_MODEL_LEN) and a key of the --config file "
    "(max-model-len). The command line wins over the environment, the environment over the file."
)


class SettingsError(Exception):
    """The settings are wrong; the message names the one and fits one line."""


def load_settings(
    arguments: Sequence[str],
    environment: Mapping[str, str] = os.environ,
    *,
    prog: str = "python -m server",
    description: str = DESCRIPTION,
) -> Settings:
    """Settings from all sources. prog and description: of the command, as its help shows them.

    Raises SettingsError. Exits, as argparse does, on --help and on flags that do not exist.
    """
    given = {
        name: value
        for name, value in vars(_parser(prog, description).parse_args(arguments)).items()
        if value is not None
    }
    config = given.pop("config", None) or environment.get(f"{ENV_PREFIX}CONFIG")
    from_file = dict(_read_yaml(Path(config))) if config else {}
    from_environment = {
        name: environment[variable]
        for name in Settings.model_fields
        if (variable := f"{ENV_PREFIX}{name.upper()}") in environment
    }
    try:
        return Settings.model_validate(from_file | from_environment | given)
    except (ValidationError, ValueError) as error:
        raise SettingsError(_sentence(error)) from None


def _parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=description, epilog=EPILOG, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings; see configs/ for ready ones")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, field in Settings.model_fields.items():
        heading = group_of(field)
        group = groups.get(heading) or groups.setdefault(heading, parser.add_argument_group(heading))
        group.add_argument(f"--{name.replace('_', '-')}", **_options(name, field))
    return parser


def _options(name: str, field: FieldInfo) -> dict[str, Any]:
    text = (field.description or "").replace("%", "%%")
    if field.default not in (None, ()) and "default:" not in text:
        words = {True: "on", False: "off"} if field.annotation is bool else {}
        shown = "audio=16" if name == "limit_mm_per_prompt" else words.get(field.default, field.default)
        text += f" (default: {shown})"
    if field.annotation is bool:
        return {"action": argparse.BooleanOptionalAction, "help": text}
    if isinstance(field.default, tuple):
        return {"nargs": "+", "action": "extend", "metavar": metavar_of(field), "help": text}
    if bool in (field.annotation, *get_args(field.annotation)):
        return {"action": argparse.BooleanOptionalAction, "help": text}
    if get_origin(field.annotation) is Literal:
        return {"choices": get_args(field.annotation), "help": text}
    return {"metavar": metavar_of(field) or _metavar(field), "help": text}


def _metavar(field: FieldInfo) -> str:
    kinds = {str: "TEXT", int: "N", float: "NUMBER"}
    return next(
        (word for kind, word in kinds.items() if kind in (field.annotation, *get_args(field.annotation))), "X"
    )


def _read_yaml(path: Path) -> Iterator[tuple[str, object]]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must hold a mapping of settings")
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in Settings.model_fields:
            raise SettingsError(f"{path}: unknown setting {key!r}")
        yield name, value


def _sentence(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    details = error.errors(include_url=False, include_input=False)[0]
    name = str(details["loc"][0]).replace("_", "-") if details["loc"] else "settings"
    return f"{name}: {details['msg']}"
