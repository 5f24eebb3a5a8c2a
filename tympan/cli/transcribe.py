"""`tympan transcribe`: files of any length to text or subtitles, on a server or on an engine of this process's own.

Either way the request is the same one, to /v1/audio/transcriptions, so the output is the same too. A file that fails
is named and the others are done; nothing is ever overwritten unless told to. The bar counts seconds of audio, as the
files' headers have them.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import soundfile
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tympan.cli.endpoint import Endpoint, check
from tympan.cli.errors import EXIT_FAILED, EXIT_USAGE, CommandError
from tympan.cli.formats import Format
from tympan.pool import run_pool

FILES_AT_ONCE = 4
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Task:
    """What to do with every file."""

    format: Format
    language: str | None = None
    model: str | None = None
    output_dir: Path | None = None
    """None: standard output."""
    force: bool = False

    def output(self, file: Path) -> Path | None:
        """Where a file's transcript goes."""
        return None if self.output_dir is None else self.output_dir / f"{file.stem}.{self.format}"


def run(files: Sequence[Path], task: Task, endpoint: Endpoint | None, settings: Sequence[str]) -> int:
    """-> exit status. endpoint: None for an engine of our own, with these settings. Raises CommandError."""
    _check(files, task)
    target = _own_engine(files, settings) if endpoint is None else _server(endpoint)
    return asyncio.run(_run(files, task, target))


async def _run(files: Sequence[Path], task: Task, target: Any) -> int:
    failures = 0
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(target)
        bar = stack.enter_context(Bar([await asyncio.to_thread(duration_of, file) for file in files]))

        async def work(index: int) -> None:
            nonlocal failures
            try:
                await _transcribe(client, files[index], task)
            except CommandError as error:
                failures += 1
                bar.say(f"tympan: {files[index]}: {error}")
            bar.done(index)

        await run_pool(_indices(len(files)), work, FILES_AT_ONCE)
    return EXIT_FAILED if failures else 0


async def _transcribe(client: httpx.AsyncClient, path: Path, task: Task) -> None:
    """Raises CommandError when this file has no transcript."""
    output = task.output(path)
    if output is not None and output.exists() and not task.force:
        raise CommandError(f"{output} exists: --force overwrites it")
    fields = {"response_format": task.format.response_format, "language": task.language, "model": task.model}
    data = {name: value for name, value in fields.items() if value is not None}
    try:
        with path.open("rb") as file:
            response = await client.post("audio/transcriptions", data=data, files={"file": (path.name, file)})
    except OSError as error:
        raise CommandError(error.strerror or str(error)) from None
    check(response)
    if output is None:
        sys.stdout.write(response.text if response.text.endswith("\n") else f"{response.text}\n")
        return
    try:
        await asyncio.to_thread(_write, output, response.text)
    except OSError as error:
        raise CommandError(f"{output}: {error.strerror}") from None


class Bar:
    """Seconds of audio that are done, on a terminal; a file whose length is not known counts as none."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self._seconds = seconds
        self._heard = 0.0
        self._console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f} of {task.total:.0f} s of audio, {task.fields[rate]:.1f} s/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not sys.stderr.isatty(),
        )
        self._task = TaskID(0)
        self._num_done = 0
        self._started = time.monotonic()

    def __enter__(self) -> Bar:
        self._task = self._progress.add_task(self._description, total=sum(self._seconds), rate=0.0)
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def done(self, index: int) -> None:
        """One file is."""
        self._num_done += 1
        self._heard += self._seconds[index]
        rate = self._heard / max(time.monotonic() - self._started, 1e-3)
        self._progress.update(self._task, description=self._description, completed=self._heard, rate=rate)

    def say(self, line: str) -> None:
        """Above the bar."""
        self._console.print(line)

    @property
    def _description(self) -> str:
        return f"{self._num_done}/{len(self._seconds)} files"


def duration_of(path: Path) -> float:
    """Seconds, by the file's header; 0 when that does not tell."""
    try:
        return float(soundfile.info(path).duration)
    except (soundfile.LibsndfileError, OSError):
        pass
    try:
        with importlib.import_module("av").open(str(path)) as container:  # half a second that most files do without
            return (container.duration or 0) / 1e6
    except (OSError, ValueError):  # what its errors derive from
        return 0.0


def _check(files: Sequence[Path], task: Task) -> None:
    """Raises CommandError for what cannot be meant."""
    if task.output_dir is None and len(files) > 1:
        raise CommandError("several files need --output-dir, one goes to standard output", status=EXIT_USAGE)
    if task.output_dir is not None:
        outputs: dict[Path | None, Path] = {}
        for file in files:
            if (other := outputs.setdefault(task.output(file), file)) is not file:
                message = f"{other} and {file} would both be written to {task.output(file)}"
                raise CommandError(message, status=EXIT_USAGE)
        try:
            task.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(f"{task.output_dir}: {error.strerror}", status=EXIT_USAGE) from None


@asynccontextmanager
async def _server(endpoint: Endpoint) -> AsyncIterator[httpx.AsyncClient]:
    with endpoint.failures():
        async with httpx.AsyncClient(**endpoint.options) as client:
            yield client


@asynccontextmanager
async def _own_engine(files: Sequence[Path], arguments: Sequence[str]) -> AsyncIterator[httpx.AsyncClient]:
    """The server in memory; it takes files of any size, as they are the caller's own. Raises CommandError."""
    offline: Any = importlib.import_module("tympan.cli.offline")
    largest = max((file.stat().st_size for file in files if file.exists()), default=0)
    async with offline.client(arguments, max_upload_mb=largest / MIB + 1) as client:
        yield client


def _write(output: Path, text: str) -> None:
    """All of it or nothing."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", newline="", dir=output.parent, prefix=f".{output.name}.", delete=False
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.chmod(file.name, 0o666 & ~_umask())
            os.replace(file.name, output)
        except BaseException:
            os.unlink(file.name)
            raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


async def _indices(count: int) -> AsyncIterator[int]:
    for index in range(count):
        yield index
