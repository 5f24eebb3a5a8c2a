"""The server's settings, for commands that take its flags. Imports nothing of the server: --help is to be quick."""

from __future__ import annotations

from collections.abc import Sequence

from configs.command_line import DESCRIPTION, SettingsError, load_settings
from configs.settings import Settings
from tympan.cli.errors import EXIT_USAGE, CommandError


def load(arguments: Sequence[str], prog: str, description: str = DESCRIPTION) -> Settings:
    """From all sources. Exits, as argparse does, on --help and on flags that do not exist. Raises CommandError."""
    try:
        return load_settings(arguments, prog=prog, description=description)
    except SettingsError as error:
        raise CommandError(str(error), status=EXIT_USAGE) from None
