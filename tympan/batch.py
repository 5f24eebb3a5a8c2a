"""`python -m tympan.batch -i requests.jsonl -o results.jsonl`: a file of requests in OpenAI's batch format.

Requests go to an engine of this process's own, through the server's application in memory, or with --url to a
server. Results are written as they come. The same command again takes up a run that was stopped or in which lines
failed: it does what has no answer yet. Exit status: 0 when every line has an answer, 1 when some have none, 2 for
wrong arguments, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from configs.command_line import SettingsError, load_settings
from configs.settings import Settings
from engine.errors import EngineStartError
from model.errors import ModelError
from tympan.batch_files import ResultFile, ResultFileError
from tympan.batch_run import BatchStopped, Target, run_batch
from tympan.session import SERVER_SETTINGS, in_process, width_of

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

MIB = 1 << 20
CONCURRENCY_OVER_HTTP = 32
PATIENCE_SECONDS = 120.0
"""For a server that is away or busy."""
TIMEOUT = httpx.Timeout(600.0, connect=10.0)
"""The read timeout of OpenAI's clients."""

DESCRIPTION = "Answer a file of requests in OpenAI's batch format, one JSON object a line."
EPILOG = (
    "All flags of `python -m server` for model, engine and audio apply too, as do its environment variables. "
    "The same command again does what has no answer yet."
)


def main() -> int:
    """Run a batch. -> exit status."""
    try:
        options, settings = _arguments(sys.argv[1:])
        results = ResultFile.open(options.output)
    except (SettingsError, ResultFileError) as error:
        return _fail(str(error), EXIT_USAGE)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}", EXIT_USAGE)
    try:
        return asyncio.run(_run(options, settings, results))
    except (EngineStartError, ModelError) as error:
        return _fail(f"the engine cannot start: {error}", EXIT_FAILED)
    except BatchStopped as error:
        return _fail(f"stopped: {error}; the same command goes on from here", EXIT_FAILED)
    except OSError as error:
        return _fail(f"{error.filename or options.output}: {error.strerror}", EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail("stopped; the same command goes on from here", EXIT_INTERRUPTED)
    finally:
        results.close()


async def _run(options: argparse.Namespace, settings: Settings, results: ResultFile) -> int:
    async with _target(options, settings) as target:
        outcome = await run_batch(target, options.input, results, shown=False if options.no_progress else None)
    earlier = f", {len(results.answered)} in earlier runs" if results.answered else ""
    message = f"{outcome.num_answered} answered{earlier}, {outcome.num_failed} failed: {options.output}"
    print(f"tympan: {message}", file=sys.stderr)  # noqa: T201
    return EXIT_FAILED if outcome.num_failed else 0


@asynccontextmanager
async def _target(options: argparse.Namespace, settings: Settings) -> AsyncIterator[Target]:
    max_body_bytes = int(settings.max_body_mb * MIB)
    if options.url is None:
        async with in_process(settings) as client:
            yield Target(client, options.concurrency or width_of(settings), max_body_bytes)
        return
    concurrency = options.concurrency or CONCURRENCY_OVER_HTTP
    key = os.environ.get("OPENAI_API_KEY")
    async with httpx.AsyncClient(
        base_url=options.url,
        headers={"Authorization": f"Bearer {key}"} if key else {},
        limits=httpx.Limits(max_connections=concurrency),
        timeout=TIMEOUT,
    ) as client:
        yield Target(client, concurrency, max_body_bytes, PATIENCE_SECONDS)


def _arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, Settings]:
    """Our own flags, and the settings. Raises SettingsError; exits, as argparse does."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    names = [word[2:].partition("=")[0].replace("-", "_") for word in rest if word.startswith("--")]
    for name in names:
        if name != "config" and name not in Settings.model_fields:
            raise SettingsError(f"there is no flag --{name.replace('_', '-')}")
        if name in SERVER_SETTINGS:
            raise SettingsError(f"a batch does not listen: --{name.replace('_', '-')} has no meaning here")
    if options.url is not None and rest:
        raise SettingsError(f"with --url the server has its own settings: {rest[0]} has no meaning here")
    if options.url is not None and not options.url.startswith(("http://", "https://")):
        raise SettingsError("--url must begin with http:// or https://")
    if options.concurrency is not None and options.concurrency < 1:
        raise SettingsError("--concurrency must be at least 1")
    if not options.input.is_file():
        raise SettingsError(f"{options.input} is no file")
    if options.output.exists() and options.output.samefile(options.input):
        raise SettingsError("the results cannot go into the file of the requests")
    return options, load_settings(rest)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tympan.batch", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False
    )
    parser.add_argument("-i", "--input", type=Path, required=True, metavar="FILE", help="requests, JSON lines")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="results, JSON lines, as they finish"
    )
    parser.add_argument(
        "--url",
        help="base URL of a server (http://host:8000/v1) to ask instead; "
        "OPENAI_API_KEY is sent where the environment has it",
    )
    parser.add_argument("--concurrency", type=int, metavar="N", help="most requests at once")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar; default: on a terminal only")
    return parser


def _fail(message: str, status: int) -> int:
    print(f"tympan: {message}", file=sys.stderr)  # noqa: T201
    return status


if __name__ == "__main__":
    sys.exit(main())
