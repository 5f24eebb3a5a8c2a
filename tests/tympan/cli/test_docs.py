"""docs/cli.md against the commands: each has its section, with the sentence and the arguments of its --help."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

from tympan.cli.main import OF_THE_SERVER, app

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "cli.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## tympan (\S+.*?)\n\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def commands(group: Any, prefix: str = "") -> dict[str, Any]:
    """Full name -> command, those of groups included."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        full = f"{prefix}{name}"
        found |= commands(command, f"{full} ") if hasattr(command, "commands") else {full: command}
    return found


COMMANDS = commands(typer.main.get_command(app))


def rows(command: Any) -> list[str]:
    """A table's rows: what may be written, and what for."""
    lines = []
    for param in command.params:
        if param.param_type_name == "argument":
            shown = param.metavar
        else:
            names = [*param.opts, *param.secondary_opts]
            shown = ", ".join(names) if param.is_flag else f"{', '.join(names)} {param.metavar}"
        lines.append(f"| `{shown}` | {param.help} |")
    return lines


def test_every_command_has_a_section() -> None:
    assert sorted(SECTIONS) == sorted(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_sections_say_what_the_help_says(name: str) -> None:
    command, section = COMMANDS[name], SECTIONS[name]
    assert section.startswith(" ".join(command.help.split()) + "\n"), name
    if command.context_settings.get("allow_extra_args"):
        assert command.context_settings == OF_THE_SERVER
    if expected := rows(command):
        table = "\n".join(["| | |", "| --- | --- |", *expected])
        assert table in section, f"\n{table}"
