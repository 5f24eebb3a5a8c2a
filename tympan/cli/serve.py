"""`tympan serve`: `python -m server` under another name, with its flags and its exit statuses."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from configs.command_line import SettingsError, load_settings
from tympan.cli.errors import EXIT_USAGE, CommandError


def run(arguments: Sequence[str]) -> int:
    """-> exit status. Settings are read before the server is imported: --help and mistakes do not wait for that."""
    try:
        settings = load_settings(arguments, prog="tympan serve")
    except SettingsError as error:
        raise CommandError(str(error), status=EXIT_USAGE) from None
    return int(importlib.import_module("server.__main__").run(settings))
