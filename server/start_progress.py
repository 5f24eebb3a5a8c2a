"""What an operator sees while the engine starts: a bar on a terminal, two log lines elsewhere."""

from __future__ import annotations

import importlib
import logging
import sys
from types import TracebackType
from typing import Any, Self

logger = logging.getLogger(__name__)


class StartProgress:
    """Told by the engine's client how many tensors are loaded; a context for the first start.

    After the context, when an engine is started again, there are only log lines.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        """as_json: standard error is a log of JSON lines, terminal or not."""
        self._is_shown = sys.stderr.isatty() and not as_json
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self._is_shown:
            self._bar = _make_bar()
            self._task = self._bar.add_task("starting the engine", total=None)
            self._bar.start()
        else:
            logger.info("starting the engine")
        return self

    def __call__(self, done: int, total: int) -> None:
        """So many of the tensors are loaded."""
        if self._bar is not None:
            what = "loading weights" if done < total else "getting ready"
            self._bar.update(self._task, description=what, completed=done, total=total)
        elif done == total:
            logger.info("loaded %d tensors", total)

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _make_bar() -> Any:
    """rich is imported for this only: a server that logs to a file has no use for it."""
    progress, console = importlib.import_module("rich.progress"), importlib.import_module("rich.console")
    return progress.Progress(
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        console=console.Console(file=sys.stderr),
        transient=True,
    )
