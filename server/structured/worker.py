"""The process that compiles grammars for compiler.py: sources in, serialized grammars or reasons out.

One JSON object on a line of standard input, one on a line of standard output. A source may be hostile, and the
library that compiles it is native code: this process ends itself when a compilation takes too long or too much
memory, and nothing else is hurt. A grammar that passes has been compiled with the checkpoint's own vocabulary, up
to the first mask with a choice in it, so the engine can do the same. Knows nothing of requests or parameters.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from, regex_to_lark

MAX_SECONDS = 0.5
"""Of one compilation, of processor time. Real schemas take milliseconds."""
MAX_MEMORY_BYTES = 1 << 30
"""Of address space, most of it never touched."""
MAX_ERROR_CHARS = 300

WHITESPACE = r" |\n {0,16}"
"""Where JSON allows white space: at most one space, or a line break and an indentation. A small model would else
write blanks until its tokens are spent."""

ESCAPES = 'nrbtf\\"'
"""What may follow a backslash in JSON strings. With u, `"\\u0061"` would pass for a property that is not `"a"`."""

_FORBIDDEN_IN_GRAMMARS = ("%json", "%llguidance")
"""They bring options, and schemas whose keywords nobody has checked."""


class GrammarError(Exception):
    """A source that cannot be compiled, and why."""


def json_schema(schema: Any) -> str:
    """Keywords were checked by server/structured/json_schema.py; this finds what is contradictory or too large."""
    source = schema if isinstance(schema, dict) else {"allOf": [schema]}
    return LLMatcher.grammar_from_json_schema(
        source, overrides={"whitespace_pattern": WHITESPACE, "json_allowed_escapes": ESCAPES}
    )


def regex(pattern: str) -> str:
    r"""The whole answer matches. \d, \w and \s are ASCII, as in JSON Schema."""
    return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(pattern, 'dws')}/")


def choice(options: list[str]) -> str:
    """The answer is one of the options."""
    return LLMatcher.grammar_from_regex("|".join(map(_literal, options)))


def grammar(text: str) -> str:
    """Lark, as llguidance knows it, or GBNF."""
    if found := next((word for word in _FORBIDDEN_IN_GRAMMARS if word in text), None):
        raise GrammarError(f"{found} is not supported in grammars")
    if not re.search(r"^\s*(\?|!)?\w+\s*(\[[^\]]*\]\s*)?:(?!:=)", text, re.MULTILINE):
        return grammar_from("gbnf", text)
    return LLMatcher.grammar_from_lark(text)


def tool_calls(source: Any) -> str:
    """Calls as server/tools/parser.py reads them. Unless they are required: text alone or before them; where text
    has a schema, that or calls."""
    more = r' ("\n<tool_call>" call)*' if source["is_parallel"] else ""
    lines = [
        r'call: "\n" '
        + f"({' | '.join(f'call_{k}' for k in range(len(source['functions'])))})"
        + r' "\n</tool_call>"'
    ]
    if source["is_required"]:
        lines += [f'start: "<tool_call>" call{more}']
    elif source["answer"] is not None:
        lines += [f'start: answer | "<tool_call>" call{more}', f"answer: {_embedded(source['answer'])}"]
    else:
        lines += [f"start: TEXT | lead call{more}", _TEXT, _LEAD]
    for k, (name, schema) in enumerate(source["functions"]):
        head = json.dumps(f'{{"name": "{name}", "arguments": ')
        lines += [f'call_{k}: {head} arguments_{k} "}}"', f"arguments_{k}: {_embedded(schema)}"]
    return LLMatcher.grammar_from_lark("\n".join(lines))


_TEXT = r"TEXT: /(?s:.*)/ & ~/(?s:.*)<tool_call>(?s:.*)/"
_LEAD = r'lead[suffix="<tool_call>"]: /(?s:.*)/'


def _embedded(schema: Any) -> str:
    """A schema inside a Lark grammar."""
    source = schema if isinstance(schema, dict) else {"allOf": [schema]}
    return "%json " + json.dumps(
        {**source, "x-guidance": {"whitespace_pattern": WHITESPACE, "json_allowed_escapes": ESCAPES}}
    )


_KINDS: dict[str, Callable[[Any], str]] = {
    "json_schema": json_schema,
    "regex": regex,
    "choice": choice,
    "grammar": grammar,
    "tool_calls": tool_calls,
}


def compile_grammar(tokenizer: LLTokenizer, kind: str, source: Any) -> str:
    """-> the serialized grammar. Raises GrammarError."""
    try:
        serialized = _KINDS[kind](source)
    except ValueError as error:  # the library's; a GrammarError passes
        raise GrammarError(str(error)) from None
    matcher = LLMatcher(tokenizer, serialized, log_level=0, limits=LLParserLimits(verbose_errors=False))
    if not matcher.is_error():
        matcher.compute_bitmask()
    if not matcher.is_error() and (forced := matcher.compute_ff_tokens()):
        matcher.consume_tokens(forced)
        matcher.compute_bitmask()
    if matcher.is_error():
        reason = matcher.get_error().removesuffix("<non-verbose/>").strip()
        raise GrammarError("nothing can match it" if reason == "NoExtensionBias" else reason)
    return serialized


def _literal(text: str) -> str:
    """A regex that matches just this text."""
    return "".join(char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)


def _answer(tokenizer: LLTokenizer, line: bytes) -> dict[str, str]:
    request = json.loads(line)
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    try:
        return {"grammar": compile_grammar(tokenizer, request["kind"], request["source"])}
    except (GrammarError, RecursionError, MemoryError) as error:
        return {"error": " ".join((str(error) or "it is too complex").split())[:MAX_ERROR_CHARS]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main(tokenizer_file: str, vocab_size: int) -> None:
    """Serve until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, native code or not
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    tokenizer = LLTokenizer(tokenizer_file, n_vocab=vocab_size)
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(_answer(tokenizer, line)).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
