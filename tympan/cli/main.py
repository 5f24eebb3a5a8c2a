"""The commands of `tympan`: their names, arguments and help. What they do is in a module each, imported as it runs.

Exit status: 0 when all went well, 1 when something failed, 2 for wrong arguments, 130 after Ctrl-C; `serve` has
those of `python -m server`. A failure is one sentence on standard error.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from tympan.cli.errors import EXIT_INTERRUPTED, CommandError

app = typer.Typer(
    name="tympan",
    help="Audio and text in, text out: Qwen2-Audio behind OpenAI's API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

OF_THE_SERVER = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Flags are the server's own (configs/settings.py); typer hands them over as they are."""

Url = Annotated[str, typer.Option(metavar="URL", envvar="OPENAI_BASE_URL", help="The server's address, up to /v1.")]
ApiKey = Annotated[
    str | None,
    typer.Option(metavar="KEY", envvar="OPENAI_API_KEY", help="The server's key, if it asks for one."),
]
DEFAULT_URL = "http://127.0.0.1:8000/v1"


@app.command(context_settings=OF_THE_SERVER, add_help_option=False)
def serve(context: typer.Context) -> None:
    """Serve a checkpoint over OpenAI's API; without flags, the small one that is bundled."""
    with _told():
        raise typer.Exit(_module("serve").run(context.args))


@app.command()
def chat(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="Audio of the first message.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Default: the first that the server lists.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system prompt.")] = None,
    max_tokens: Annotated[int | None, typer.Option(metavar="N", min=1, help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(metavar="T", min=0, max=2, help="0 is greedy.")] = None,
) -> None:
    """Talk with a server in the terminal, or send it one question: echo Hello | tympan chat."""
    with _told():
        module = _module("chat")
        sampling = module.Sampling(max_tokens, temperature)
        module.run(_endpoint(url, api_key), files or [], model, system, sampling)


@contextmanager
def _told() -> Iterator[None]:
    """What ends a command becomes its exit status, and one sentence."""
    try:
        yield
    except CommandError as error:
        typer.echo(f"tympan: {error}", err=True)
        raise typer.Exit(error.status) from None
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _module(name: str) -> Any:
    return importlib.import_module(f"tympan.cli.{name}")


def _endpoint(url: str, api_key: str | None) -> Any:
    return _module("endpoint").Endpoint.of(url, api_key)
