"""What an answer may do with tools: which functions it may call, whether it must, how often. And earlier calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from pydantic import JsonValue

from server.tools.parser import StreamingToolParser

TOOL_CALLS: Final = "tool_calls"
"""The finish reason of an answer that ended with calls."""


@dataclass(frozen=True, slots=True)
class Function:
    """A function that may be called."""

    name: str
    description: str = ""
    parameters: Mapping[str, JsonValue] | None = None
    """A JSON schema of an object; None: no parameters."""
    is_strict: bool = False
    """Calls follow the schema, whatever the model would rather write."""
    place: str = "tools"
    """Where in the request the parameters stand."""

    def to_json(self) -> dict[str, JsonValue]:
        """As chat templates are given it."""
        function: dict[str, JsonValue] = {"name": self.name}
        if self.description:
            function["description"] = self.description
        if self.parameters is not None:
            function["parameters"] = dict(self.parameters)
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class CalledFunction:
    """A call that the model made in an earlier turn, or is said to have made."""

    id: str
    name: str
    arguments: Mapping[str, JsonValue]


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """The tools of one request, as they were chosen. Without functions, tools play no part."""

    functions: tuple[Function, ...] = ()
    is_required: bool = False
    """The answer is calls and nothing else."""
    is_parallel: bool = True
    """It may hold more than one call."""

    def parser(self, *, is_constrained: bool) -> StreamingToolParser | None:
        """A reader for one answer, if there may be calls in it.

        `is_constrained`: a grammar makes sure that they are well-formed.
        """
        if not self.functions:
            return None
        names = {function.name for function in self.functions}
        return StreamingToolParser(names, is_eager=is_constrained, max_calls=None if self.is_parallel else 1)


NO_TOOLS = ToolPlan()
