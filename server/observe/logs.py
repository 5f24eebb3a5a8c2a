"""Log lines: one format for the server's and uvicorn's own, to standard error, for people or as JSON.

What people say and write never goes into them.
"""

from __future__ import annotations

import logging
import logging.config

from engine.errors import EngineError
from engine.log_lines import JsonFormatter, log_bug, log_the_uncaught


def log_failure(logger: logging.Logger, what: str, error: Exception) -> None:
    """A failure that is not the client's. A traceback only for bugs: a dead engine would log one per request."""
    if isinstance(error, EngineError):
        logger.error("%s: %s", what, error)
    else:
        log_bug(logger, what, error)


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
                "httpcore": {"level": "WARNING"},  # and it the headers that origins answer with
                "uvicorn.access": {"level": "WARNING"},  # ours has no query strings
                "uvicorn": {"level": "WARNING" if level != "debug" else "DEBUG"},
            },
        }
    )
    if as_json:
        log_the_uncaught()
