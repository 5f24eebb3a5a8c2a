"""The grammar of an answer that may call tools: from what was chosen to what the engine's matcher is made of.

Where a call is demanded, the answer is calls and nothing else, each with arguments that satisfy its function's
schema. Where the choice is free and some function is strict, text may come first, and a call, once begun, is held
to the schema of its function: its own if that is strict, else any object. Where the text has a schema to satisfy,
the answer is either that or calls.
"""

from __future__ import annotations

import asyncio
from typing import Any

from server.requests.constraints import SchemaValue
from server.structured.compiler import GrammarCompiler
from server.structured.json_schema import check_json_schema
from server.tools.plan import Function, ToolPlan


async def compile_calls(
    compiler: GrammarCompiler, plan: ToolPlan, answer_schema: tuple[SchemaValue, str] | None
) -> str | None:
    """-> the grammar, if there are functions and anything is to be constrained.

    `answer_schema`: of the text, with its place in the request. Raises ApiError for schemas that cannot be honoured.
    """
    answer = None if plan.is_required else answer_schema
    is_strict = plan.is_required or any(function.is_strict for function in plan.functions)
    if not plan.functions or not (is_strict or answer):
        return None
    return await compiler.tool_calls(
        await asyncio.to_thread(_checked_schemas, plan, answer),
        answer=answer[0] if answer else None,
        is_required=plan.is_required,
        is_parallel=plan.is_parallel,
    )


def _checked_schemas(plan: ToolPlan, answer: tuple[SchemaValue, str] | None) -> list[tuple[str, dict[str, Any]]]:
    """Of the arguments, by name of the function. Large ones take a while."""
    if answer is not None:
        check_json_schema(*answer)
    return [(function.name, _arguments_schema(function, plan)) for function in plan.functions]


def _arguments_schema(function: Function, plan: ToolPlan) -> dict[str, Any]:
    if function.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if not (plan.is_required or function.is_strict):
        return {"type": "object"}
    check_json_schema(function.parameters, function.place)
    return {**function.parameters, "type": "object"}
