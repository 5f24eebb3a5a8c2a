"""What comes back for one conversation or prompt: OpenAI's body, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class AnswerError(Exception):
    """One item of a batch has no answer; the others may. Carries what the HTTP API says about it."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None, index: int = 0
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        """As the HTTP server's: 4xx for a fault of the item, 5xx for one of the engine."""
        self.param = param
        """The parameter or part that is wrong (`messages[0].content[1]`)."""
        self.code = code
        self.index = index
        """Of the item in what was asked."""

    def __str__(self) -> str:
        place = f"item {self.index}" + (f", {self.param}" if self.param else "")
        return f"{place}: {self.message}"

    @classmethod
    def from_body(cls, status: int, body: Mapping[str, Any]) -> AnswerError:
        """From an answer of the API in OpenAI's error envelope."""
        error = body["error"]
        return cls(error["message"], status=status, param=error["param"], code=error["code"])


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one item. What it holds is read through properties, which raise `error` if there is one."""

    body: Mapping[str, Any]
    """As OpenAI's API has it; empty when the item failed."""
    error: AnswerError | None = None

    @property
    def choices(self) -> list[Mapping[str, Any]]:
        """OpenAI's choices: one, or `n`."""
        if self.error is not None:
            raise self.error
        choices: list[Mapping[str, Any]] = self.body["choices"]
        return choices

    @property
    def texts(self) -> list[str]:
        """The texts of all choices; empty where a choice holds something else."""
        return [
            (choice["message"]["content"] if "message" in choice else choice["text"]) or ""
            for choice in self.choices
        ]

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.texts[0]

    @property
    def finish_reason(self) -> str:
        """Of the first choice: `stop`, or `length`."""
        return str(self.choices[0]["finish_reason"])

    @property
    def usage(self) -> Mapping[str, Any]:
        """Token counts, as the API has them."""
        if self.error is not None:
            raise self.error
        usage: Mapping[str, Any] = self.body["usage"]
        return usage
