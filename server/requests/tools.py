"""Tools as requests bring them: function definitions, and what the answer shall do with them.

Chat completions nest a function under its type, the Responses API does not; both come down to FunctionDefinition
and ToolPlan. Only functions exist here: custom tools, and those that OpenAI runs itself, are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, JsonValue, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from server.requests.parameters import refused
from server.requests.strict_model import StrictModel
from server.tools.plan import Function, ToolPlan

MAX_TOOLS = 128
"""OpenAI's limit, of tools and of calls in one message."""

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class FunctionDefinition(StrictModel):
    """A function that may be called."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    """A JSON schema of an object. Omitted: no parameters."""
    strict: bool | None = None
    """Whether calls must follow the schema where the choice is free; where a call is demanded they always do."""

    @field_validator("parameters")
    @classmethod
    def _check_parameters(cls, parameters: dict[str, JsonValue] | None) -> dict[str, JsonValue] | None:
        if parameters and parameters.get("type", "object") != "object":
            raise invalid_here("The parameters of a function must be a JSON schema of type 'object'.")
        return parameters

    def function(self, place: str) -> Function:
        """As the rest of the server knows it. `place`: where in the request this definition stands."""
        return Function(self.name, self.description or "", self.parameters, bool(self.strict), f"{place}.parameters")


class FunctionTool(StrictModel):
    """A tool of chat completions."""

    type: Literal["function"]
    function: FunctionDefinition


class UnknownTool(StrictModel):
    """Any other tool: always refused, by the name of its type."""

    type: JsonValue = None

    @model_validator(mode="after")
    def _refuse(self) -> Self:
        if self.type is None:
            raise refused("type", "A tool needs a 'type'.", "missing_required_parameter")
        name = repr(self.type[:40]) if isinstance(self.type, str) else "that"
        raise refused("type", f"Tools of type {name} are not supported; function is.", "invalid_value")


class FunctionNameOnly(StrictModel):
    name: str


class NamedFunction(StrictModel):
    """This function, and nothing else."""

    type: Literal["function"]
    function: FunctionNameOnly


class AllowedTools(StrictModel):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedToolsChoice(StrictModel):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class UnknownChoice(StrictModel):
    """Any other choice: always refused, by the name of its type."""

    type: JsonValue = None

    @model_validator(mode="after")
    def _refuse(self) -> Self:
        if self.type is None:
            raise refused("type", "A tool choice needs a 'type'.", "missing_required_parameter")
        name = repr(self.type[:40]) if isinstance(self.type, str) else "that"
        message = f"A tool choice of type {name} is not supported; function and allowed_tools are."
        raise refused("type", message, "invalid_value")


def tag_by_type(*known: str) -> Discriminator:
    """The union's member by the value of `type`: `<type>`, or `<unknown>`."""

    def tag(value: object) -> str:
        kind = value.get("type") if isinstance(value, Mapping) else None
        return f"<{kind}>" if isinstance(kind, str) and kind in known else "<unknown>"

    return Discriminator(tag)


def choice_tag(choice: object) -> str:
    """The kind of a tool choice: a mode, or by its type."""
    if not isinstance(choice, Mapping):
        return "<mode>"
    kind = choice.get("type")
    return f"<{kind}>" if isinstance(kind, str) and kind in ("function", "allowed_tools") else "<unknown>"


ToolMode = Literal["none", "auto", "required"]
Tool = Annotated[
    Annotated[FunctionTool, Tag("<function>")] | Annotated[UnknownTool, Tag("<unknown>")], tag_by_type("function")
]
ToolChoice = Annotated[
    Annotated[ToolMode, Tag("<mode>")]
    | Annotated[NamedFunction, Tag("<function>")]
    | Annotated[AllowedToolsChoice, Tag("<allowed_tools>")]
    | Annotated[UnknownChoice, Tag("<unknown>")],
    Discriminator(choice_tag),
]


def tool_plan(tools: Sequence[Tool] | None, choice: ToolChoice | None, parallel: bool | None) -> ToolPlan:
    """What the tool parameters of a chat request come down to.

    Raises PydanticCustomError: names given twice, a choice without tools or of a function that is not there.
    """
    functions = [
        tool.function.function(f"tools[{index}].function")
        for index, tool in enumerate(tools or ())
        if isinstance(tool, FunctionTool)
    ]
    check_unique(functions, "function.name")
    match choice:
        case NamedFunction():
            allowed, mode = [(choice.function.name, "tool_choice.function.name")], "required"
        case AllowedToolsChoice():
            names = [entry.function.name for entry in choice.allowed_tools.tools]
            where = "tool_choice.allowed_tools.tools[{}].function.name"
            allowed, mode = [(name, where.format(k)) for k, name in enumerate(names)], choice.allowed_tools.mode
        case _:
            assert not isinstance(choice, UnknownChoice), "refused by its validator"
            allowed, mode = [], choice or "auto"
    is_parallel = parallel is not False and not isinstance(choice, NamedFunction)
    return choose_tools(functions, mode, allowed, is_parallel=is_parallel, is_chosen=choice is not None)


def check_unique(functions: Sequence[Function], where: str) -> None:
    """Raise PydanticCustomError that names the first tool whose name was there before."""
    seen: set[str] = set()
    for index, function in enumerate(functions):
        if function.name in seen:
            message = f"Invalid 'tools': there are two functions with the name '{function.name}'."
            raise refused(f"tools[{index}].{where}", message, "invalid_value")
        seen.add(function.name)


def choose_tools(
    functions: Sequence[Function],
    mode: str,
    allowed: Sequence[tuple[str, str]],
    *,
    is_parallel: bool,
    is_chosen: bool,
) -> ToolPlan:
    """A plan for `functions` under `mode`. `allowed`: names to keep, each with its place in the request."""
    if is_chosen and mode != "none" and not functions:
        message = "The 'tool_choice' parameter is only allowed when 'tools' are given."
        raise refused("tool_choice", message, "invalid_value")
    names = {function.name for function in functions}
    for name, where in allowed:
        if name not in names:
            raise refused(where, f"There is no function '{name[:64]}' in 'tools'.", "invalid_value")
    kept = {name for name, _ in allowed} or names
    return ToolPlan(
        functions=tuple(function for function in functions if function.name in kept) if mode != "none" else (),
        is_required=mode == "required",
        is_parallel=is_parallel,
    )


def invalid_here(message: str) -> PydanticCustomError:
    """An error for validators of single fields: pydantic knows the path."""
    return refused("", message, "invalid_value")
