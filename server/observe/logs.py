"""Log lines: one format for the server's and uvicorn's own, to standard error, for people or as JSON.

What people say and write never goes into them.
"""

from __future__ import annotations

import json
import logging
import logging.config
import time
from typing import Any

from engine.errors import EngineError


def log_failure(logger: logging.Logger, what: str, error: Exception) -> None:
    """A failure that is not the client's. A traceback only for bugs: a dead engine would log one per request."""
    logger.error("%s: %s", what, error, exc_info=None if isinstance(error, EngineError) else error)


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what a line's `request` says (server/observe/access_log.py) is among its keys."""

    def format(self, record: logging.LogRecord) -> str:
        """-> the line."""
        whole, millis = divmod(round(1000 * record.created), 1000)
        line: dict[str, Any] = {
            "ts": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{millis:03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if request := getattr(record, "request", None):
            return json.dumps(line | request)
        line["message"] = record.getMessage()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_logging(level: str, *, as_json: bool = False) -> None:
    """Set up logging for the whole process."""
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {
                "line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"},
                "json": {"()": JsonFormatter},
            },
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json" if as_json else "line"}},
            "root": {"level": level.upper(), "handlers": ["stderr"]},
            "loggers": {
                "httpx": {"level": "WARNING"},  # it logs URLs, and those may hold secrets
                "uvicorn.access": {"level": "WARNING"},  # ours has no query strings
                "uvicorn": {"level": "WARNING" if level != "debug" else "DEBUG"},
            },
        }
    )
