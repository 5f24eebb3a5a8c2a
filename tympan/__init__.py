"""Tympan without a server: a batch of conversations from Python (`LLM`), a file of requests (`tympan.batch`).

Both drive the server's own application in memory, so that a parameter, a check or a message is the same here and
over HTTP. Nothing else imports this package.
"""

from tympan.answer import Answer, AnswerError
from tympan.llm import LLM

__all__ = ["LLM", "Answer", "AnswerError"]
