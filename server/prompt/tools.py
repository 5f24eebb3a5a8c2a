"""Tools in a conversation, for chat templates that know none: as plain text in turns of the usual roles.

Qwen2's convention, which is Hermes': the functions are listed in the system turn, calls are <tool_call> blocks of
the assistant, results are <tool_response> blocks of the user. All of it is the caller's text, the words around
the lists included: nothing here is, or can become, a control token. Qwen2.5's own template gives the same text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby

from server.prompt.chat_template import Turn
from server.tools.parser import CLOSE, OPEN
from server.tools.plan import CalledFunction, Function

DEFAULT_SYSTEM = "You are a helpful assistant."
"""What Qwen2's templates say where the conversation has no system message."""

_INTRODUCTION = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""
_INSTRUCTION = f"""
</tools>

For each function call, return a json object with function name and arguments within {OPEN}{CLOSE} XML tags:
{OPEN}
{{"name": <function-name>, "arguments": <args-json-object>}}
{CLOSE}"""


def fold_tools(turns: Sequence[Turn], functions: Sequence[Function]) -> list[Turn]:
    """The conversation with its functions, calls and results written out."""
    folded: list[Turn] = []
    for is_result, group in groupby(turns, lambda turn: turn.role == "tool"):
        members = list(group)
        folded += [_results(members)] if is_result else map(_without_calls, members)
    if not functions:
        return folded
    system, others = (folded[0], folded[1:]) if folded[0].role == "system" else (None, folded)
    return [_with_functions(system or Turn("system", DEFAULT_SYSTEM), functions), *others]


def _with_functions(system: Turn, functions: Sequence[Function]) -> Turn:
    listed = "\n".join(_to_json(function.to_json()) for function in functions)
    text = f"\n\n{_INTRODUCTION}{listed}{_INSTRUCTION}"
    if isinstance(system.content, str):
        return replace(system, content=system.content + text)
    return replace(system, content=(*system.content, text))


def _without_calls(turn: Turn) -> Turn:
    if not turn.calls:
        return turn
    blocks = "\n".join(_block(call) for call in turn.calls)
    if isinstance(turn.content, str):
        return Turn(turn.role, f"{turn.content}\n{blocks}" if turn.content else blocks)
    return Turn(turn.role, (*turn.content, f"\n{blocks}"))


def _block(call: CalledFunction) -> str:
    return f'{OPEN}\n{{"name": {_to_json(call.name)}, "arguments": {_to_json(call.arguments)}}}\n{CLOSE}'


def _results(turns: Iterable[Turn]) -> Turn:
    """Results that follow each other share a turn."""
    blocks = []
    for turn in turns:
        content = turn.content if isinstance(turn.content, str) else "".join(filter(None, turn.content))
        blocks.append(f"<tool_response>\n{content}\n</tool_response>")
    return Turn("user", "\n".join(blocks))


def _to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
