"""Round the server: a batch of conversations from Python (`LLM`), a file of requests (`tympan.batch`), and the
command `tympan` (`tympan.cli`).

The first two drive the server's own application in memory, so that a parameter, a check or a message is the same
here and over HTTP. Nothing else imports this package. `LLM` is imported when it is first asked for: the command line
has to be there at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tympan.answer import Answer, AnswerError

if TYPE_CHECKING:
    from tympan.llm import LLM

__all__ = ["LLM", "Answer", "AnswerError"]


def __getattr__(name: str) -> Any:
    if name != "LLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("tympan.llm").LLM
