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

from server.version import VERSION
from tympan.cli.errors import EXIT_INTERRUPTED, CommandError
from tympan.cli.formats import Format

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

DOCTORS_OWN = "With --json, as one JSON document. Exit status: 0 when nothing failed, 1 when something did."

Url = Annotated[str, typer.Option(metavar="URL", envvar="OPENAI_BASE_URL", help="The server's address, up to /v1.")]
ApiKey = Annotated[
    str | None,
    typer.Option(metavar="KEY", envvar="OPENAI_API_KEY", help="The server's key, if it asks for one."),
]
ServedModel = Annotated[str | None, typer.Option(metavar="NAME", help="Default: the first that the server lists.")]
DEFAULT_URL = "http://127.0.0.1:8000/v1"


def _say_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"tympan {VERSION}")
        raise typer.Exit


@app.callback()
def _of_all_commands(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(context_settings=OF_THE_SERVER, add_help_option=False)
def serve(context: typer.Context) -> None:
    """Serve a checkpoint over OpenAI's API; without flags, the small one that is bundled."""
    with _told():
        settings = _module("settings").load(context.args, "tympan serve")
        raise typer.Exit(importlib.import_module("server.__main__").run(settings))


@app.command()
def chat(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="Audio of the first message.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    model: ServedModel = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system prompt.")] = None,
    max_tokens: Annotated[int | None, typer.Option(metavar="N", min=1, help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(metavar="T", min=0, max=2, help="0 is greedy.")] = None,
) -> None:
    """Talk with a server in the terminal, or send it one question: echo Hello | tympan chat."""
    with _told():
        module = _module("chat")
        sampling = module.Sampling(max_tokens, temperature)
        module.run(_endpoint(url, api_key), files or [], model, system, sampling)


@app.command()
def transcribe(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Recordings of any length.")],
    format: Annotated[Format, typer.Option(metavar="FORMAT", help="srt, vtt, txt or json.")] = Format.TXT,
    language: Annotated[
        str | None, typer.Option(metavar="CODE", help="What is spoken, as en; default: the model finds out.")
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where transcripts go; default: standard output, of one file."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite transcripts that exist.")] = False,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="A server's address; default: an engine of its own.")
    ] = None,
    api_key: ApiKey = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --url, of the server; else as tympan serve has it.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Settings of its own engine, as tympan serve has them.")
    ] = None,
) -> None:
    """Transcribe recordings, on a server or without one."""
    with _told():
        module = _module("transcribe")
        task = module.Task(format, language, model if url else None, output_dir, force)
        settings = [] if config is None else ["--config", str(config)]
        settings += [] if model is None else ["--model", model]
        raise typer.Exit(module.run(files, task, _endpoint(url, api_key) if url else None, settings))


@app.command()
def bench(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    model: ServedModel = None,
    requests: Annotated[int, typer.Option(metavar="N", min=1, help="Requests that count.")] = 64,
    warmup: Annotated[int, typer.Option(metavar="N", min=0, help="Requests before those.")] = 2,
    concurrency: Annotated[int, typer.Option(metavar="N", min=1, help="Clients of a closed loop.")] = 16,
    rate: Annotated[
        float | None, typer.Option(metavar="R", min=0.001, help="Arrivals a second: an open loop instead.")
    ] = None,
    clip_seconds: Annotated[float, typer.Option(metavar="S", min=0.1, max=30, help="Audio of a request.")] = 10.0,
    output_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Length of an answer.")] = 64,
    seed: Annotated[int, typer.Option(metavar="N", help="Of clips and arrivals: another one is new to caches.")] = 0,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures there, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Put load on a server, and measure what its users get."""
    with _told():
        plan = importlib.import_module("tympan.load").LoadPlan(
            model=model,
            requests=requests,
            warmup=warmup,
            concurrency=concurrency,
            rate=rate,
            clip_seconds=clip_seconds,
            output_tokens=output_tokens,
            seed=seed,
        )
        raise typer.Exit(_module("bench").run(_endpoint(url, api_key), plan, output, as_json=as_json))


Revision = Annotated[str | None, typer.Option(metavar="NAME", help="Branch, tag or commit on the hub.")]
DownloadDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", envvar="TYMPAN_DOWNLOAD_DIR", help="Where downloads are kept, if not in the hub's cache."
    ),
]
models = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(models, name="models", help="Checkpoints on this machine.")


@models.command("list")
def list_models(download_dir: DownloadDir = None) -> None:
    """List the Qwen2-Audio checkpoints that are cached: size, revision, precision, and whether they are complete."""
    with _told():
        _module("models").show_list(download_dir)


@models.command()
def download(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The checkpoint's id on the hub: owner/name.")],
    revision: Revision = None,
    download_dir: DownloadDir = None,
) -> None:
    """Fetch a checkpoint from the Hugging Face hub, what is not there yet of it, and print its folder."""
    with _told():
        typer.echo(_module("models").download(name, revision, download_dir))


@models.command()
def verify(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A folder, or the id of a checkpoint in the cache.")],
    revision: Revision = None,
    download_dir: DownloadDir = None,
) -> None:
    """Check a checkpoint: files, headers, whether tokenizer and configuration fit, sha256 where it is known."""
    with _told():
        _module("models").verify(name, revision, download_dir)


@app.command(context_settings=OF_THE_SERVER, add_help_option=False)
def doctor(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document for scripts.")] = False,
) -> None:
    """Explain whether `tympan serve` with the same flags would work here, and what to do if not."""
    with _told():
        settings = _module("settings").load(context.args, "tympan doctor", f"{context.command.help} {DOCTORS_OWN}")
        raise typer.Exit(_module("doctor").run(settings, as_json=as_json))


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
