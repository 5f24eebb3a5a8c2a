"""Prompt wordings that ship with the server, as YAML files beside this one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml


def transcription_recipe(name: Literal["chat", "base"]) -> dict[str, Any]:
    """The wordings of one kind of checkpoint, by their keys in transcription.yaml."""
    path = Path(__file__).parent / "transcription.yaml"
    recipe: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))[name]
    return recipe
