"""Structured output: from a JSON schema, regex, choice or grammar to what the engine's matcher is made of.

Sources are compiled by a process of its own (server/structured/worker.py), started when first needed; one that takes
too long or too much memory ends that process alone, and the next source gets a new one. Answers, refusals too, are
kept for the sources seen last, for the caller who brought them. Knows nothing of tokens: the grammar that comes back
means the same to every checkpoint.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from hashlib import sha256
from pathlib import Path
from typing import Any

from server.access.auth import EVERYBODY
from server.errors import bad_request
from server.requests.constraints import StructuredOutputs
from server.requests.schema import GenerationRequest
from server.structured.json_schema import check_json_schema

MAX_SOURCE_CHARS = 128 << 10
"""Of a schema, grammar or regex, or of all options of a choice."""
MAX_CHOICES = 10_000
CACHE_SIZE = 256
"""Sources whose answer is kept."""
REPLACED_AFTER = 2000
"""Compilations: what the process has not given back by then goes with it."""
TOO_COMPLEX = "it is too complex"

_SOURCES = Path(__file__).resolve().parents[2]

_CODES = {
    "json_schema": "invalid_json_schema",
    "regex": "invalid_regex",
    "choice": "invalid_choice",
    "grammar": "invalid_grammar",
    "tool_calls": "invalid_json_schema",
}


async def compile_constraint(compiler: GrammarCompiler, request: GenerationRequest) -> str | None:
    """-> the grammar that a request asks for, if it asks for one. Raises ApiError."""
    if request.answer_schema is not None:
        return await compiler.json_schema(*request.answer_schema)
    match request.structured_outputs:
        case None:
            return None
        case StructuredOutputs(json_=str() as text):
            return await compiler.json_schema(_parse_schema(text), "structured_outputs.json")
        case StructuredOutputs(json_=dict() | bool() as schema):
            return await compiler.json_schema(schema, "structured_outputs.json")
        case StructuredOutputs(regex=str() as pattern):
            return await compiler.regex(pattern, "structured_outputs.regex")
        case StructuredOutputs(choice=list() as options):
            return await compiler.choice(options, "structured_outputs.choice")
        case StructuredOutputs(grammar=str() as text):
            return await compiler.grammar(text, "structured_outputs.grammar")
        case _:
            return await compiler.json_object()


def _parse_schema(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        message = "Invalid 'structured_outputs.json': the text is not JSON, or too deep."
        raise bad_request(message, "structured_outputs.json", "invalid_json_schema") from None


class GrammarCompiler:
    """Each method raises ApiError, a 400 with `param`, for a source that cannot be honoured."""

    def __init__(self, checkpoint: Path, vocab_size: int) -> None:
        self._worker = _Worker(str(checkpoint.resolve() / "tokenizer.json"), str(vocab_size))
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._cache: OrderedDict[bytes, dict[str, str]] = OrderedDict()
        self._caller = EVERYBODY

    def of(self, caller: str) -> GrammarCompiler:
        """The same, for one caller, whom the time taken tells nothing of what others have had compiled."""
        compiler = copy(self)
        compiler._caller = caller
        return compiler

    async def json_schema(self, schema: dict[str, Any] | bool, param: str) -> str:
        """A grammar of the JSON texts that satisfy a schema, in compact form or with bounded white space."""
        return await self._run(self._json_schema, schema, param)

    async def json_object(self) -> str:
        """A grammar of all JSON objects."""
        return await self.json_schema({"type": "object"}, "response_format")

    async def regex(self, pattern: str, param: str) -> str:
        """A grammar of the texts that match a regex from end to end."""
        return await self._run(self._compile, "regex", pattern, param)

    async def choice(self, options: list[str], param: str) -> str:
        """A grammar of a few texts."""
        if not 0 < len(options) <= MAX_CHOICES:
            message = f"Invalid '{param}': expected 1 to {MAX_CHOICES} choices."
            raise bad_request(message, param, "invalid_choice")
        return await self._run(self._compile, "choice", options, param)

    async def grammar(self, text: str, param: str) -> str:
        """A context-free grammar, in Lark's notation or GBNF."""
        return await self._run(self._compile, "grammar", text, param)

    async def tool_calls(
        self,
        functions: Sequence[tuple[str, dict[str, Any]]],
        *,
        answer: dict[str, Any] | bool | None,
        is_required: bool,
        is_parallel: bool,
    ) -> str:
        """A grammar of answers that call functions, given by name and schema of their arguments.

        `answer`: the schema of what is no call; None: any text. All schemas were checked.
        """
        source = {
            "functions": functions,
            "answer": answer,
            "is_required": is_required,
            "is_parallel": is_parallel,
        }
        return await self._run(self._compile, "tool_calls", source, "tools")

    def close(self) -> None:
        """End the process. A later source starts a new one."""
        self._thread.submit(self._worker.stop).result()

    async def _run(self, function: Callable[..., str], *arguments: Any) -> str:
        """In a thread of our own, one source after the other: a queue of slow ones must not fill the loop's pool."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def _json_schema(self, schema: dict[str, Any] | bool, param: str) -> str:
        check_json_schema(schema, param)
        return self._compile("json_schema", schema, param)

    def _compile(self, kind: str, source: Any, param: str) -> str:
        line = json.dumps({"kind": kind, "source": source}).encode()
        if len(line) > MAX_SOURCE_CHARS:
            message = f"Invalid '{param}': too large. At most {MAX_SOURCE_CHARS} characters are accepted."
            raise bad_request(message, param, _CODES[kind])
        key = sha256(self._caller.encode() + line).digest()
        answer = self._cache.get(key) or self._worker.ask(line)
        self._cache[key] = answer
        self._cache.move_to_end(key)
        if len(self._cache) > CACHE_SIZE:
            self._cache.popitem(last=False)
        if "error" in answer:
            raise bad_request(f"Invalid '{param}': {answer['error']}.", param, _CODES[kind])
        return answer["grammar"]


class _Worker:
    """The process, used from one thread."""

    def __init__(self, *arguments: str) -> None:
        self._command = [sys.executable, "-m", "server.structured.worker", *arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self._num_compiled = 0

    def ask(self, line: bytes) -> dict[str, str]:
        """One source to the process and back. A process that ends instead of answering has refused the source."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line + b"\n")
            process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = b""
        if not reply:
            if process.wait() >= 0:
                raise RuntimeError(f"the compiler of grammars ended with status {process.returncode}")
            self.stop()  # killed by its own timer, or out of memory
            return {"error": TOO_COMPLEX}
        self._num_compiled += 1
        if self._num_compiled % REPLACED_AFTER == 0:
            self.stop()
        answer: dict[str, str] = json.loads(reply)
        return answer

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:  # it ended while idle
            self.stop()
        if self._process is None:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=_SOURCES
            )
        return self._process

    def stop(self) -> None:
        """End the process and close its pipes."""
        if self._process is not None:
            self._process.kill()
            self._process.__exit__(None, None, None)
            self._process = None
