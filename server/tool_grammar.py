"""The grammar of an answer that calls tools: from what was chosen to what the engine's matcher is made of.

Where a call is demanded, the answer is calls and nothing else, each with arguments that satisfy its function's
schema. Where the choice is free and some function is strict, text may come first, and a call, once begun, is held
to the schema of its function: its own if that is strict, else any object.
"""

from __future__ import annotations

from typing import Any

from server.json_schema import check_json_schema
from server.structured import GrammarCompiler
from server.tool_plan import Function, ToolPlan


async def compile_calls(compiler: GrammarCompiler, plan: ToolPlan) -> str | None:
    """-> the grammar, if calls are to be constrained. Raises ApiError for schemas that cannot be honoured."""
    if not plan.is_constrained:
        return None
    return await compiler.tool_calls(
        [(function.name, _schema(function, plan)) for function in plan.functions],
        is_required=plan.is_required,
        is_parallel=plan.is_parallel,
    )


def _schema(function: Function, plan: ToolPlan) -> dict[str, Any]:
    """Of the function's arguments."""
    if function.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if not (plan.is_required or function.is_strict):
        return {"type": "object"}
    check_json_schema(function.parameters, function.place)
    return {**function.parameters, "type": "object"}
