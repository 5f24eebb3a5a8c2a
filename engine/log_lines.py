"""Log lines of every process of a server: one format, for people or as JSON, to standard error. Torch-free.

What people say and write never goes into them.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import Any


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what a line's `request` says is among its keys."""

    def __init__(self, process: str = "server") -> None:
        """process: what the lines call theirs."""
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """-> the line."""
        whole, millis = divmod(round(1000 * record.created), 1000)
        line: dict[str, Any] = {
            "ts": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{millis:03}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
        }
        if request := getattr(record, "request", None):
            return json.dumps(line | request)
        line["message"] = record.getMessage()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_bug(logger: logging.Logger, what: str, error: BaseException) -> None:
    """A failure that should not be: where, of what kind. Its words may hold what somebody sent: at `debug` only."""
    if logger.isEnabledFor(logging.DEBUG):
        logger.error(what, exc_info=error)
        return
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s: %s\n%s", what, type(error).__name__, frames.rstrip())


def log_all(process: str, level: str = "info", *, as_json: bool = False) -> None:
    """Set up this process's logging. As JSON, warnings and what nobody catches are lines too."""
    handler = logging.StreamHandler(sys.stderr)
    line = f"%(asctime)s %(levelname)s {process}: %(message)s"
    handler.setFormatter(JsonFormatter(process) if as_json else logging.Formatter(line))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    if as_json:
        log_the_uncaught()


def log_the_uncaught() -> None:
    """What would go to standard error as it is: warnings, and exceptions that end the process or a thread."""
    logging.captureWarnings(capture=True)
    logger = logging.getLogger(__name__)

    def told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
        else:
            logger.critical("not caught", exc_info=(kind, error, trace))

    def told_of_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None:
            told(args.exc_type, args.exc_value, args.exc_traceback)

    sys.excepthook = told
    threading.excepthook = told_of_thread
