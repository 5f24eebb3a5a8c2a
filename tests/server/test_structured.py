"""Structured output over HTTP: what reaches the engine, and that whatever cannot be honoured is a 400 in time."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from llguidance import LLMatcher, LLTokenizer
from pydantic import BaseModel

from server.errors import ApiError
from server.structured.compiler import CACHE_SIZE, TOO_COMPLEX, GrammarCompiler
from server.structured.worker import MAX_SECONDS
from tests.server.conftest import Served, Servers, user

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
SCHEMA_PARAM = "response_format.json_schema.schema"


@pytest.fixture(scope="module")
def shared_server(servers: Servers) -> Served:
    """A server that reads bodies of its usual size."""
    return servers.start()


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [user("hi")], **fields}


def json_schema(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **fields}}


def formatted(schema: Any, **fields: Any) -> dict[str, Any]:
    return chat(response_format=json_schema(schema, **fields))


def structured(**fields: Any) -> dict[str, Any]:
    return chat(structured_outputs=fields)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


CYCLE = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
MANY = {f"p{k}": {"type": "string", "description": "x" * 20} for k in range(30_000)}
SLOW = {"type": "object", "properties": {f"p{k}": True for k in range(6000)}}

REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "reference cycle": (formatted(CYCLE), SCHEMA_PARAM, "invalid_json_schema"),
    "self reference": (formatted({"allOf": [{"$ref": "#"}]}), SCHEMA_PARAM, "invalid_json_schema"),
    "remote reference": (formatted({"$ref": "http://127.0.0.1:1/x"}), SCHEMA_PARAM, "invalid_json_schema"),
    "unknown reference": (formatted({"$ref": "#/$defs/no"}), SCHEMA_PARAM, "invalid_json_schema"),
    "too deep": (formatted(nested(70)), SCHEMA_PARAM, "invalid_json_schema"),
    "2 MB": (formatted({"type": "object", "properties": MANY}), SCHEMA_PARAM, "invalid_json_schema"),
    "100,000 strings": (
        formatted({"enum": [f"s{k}" for k in range(100_000)]}), SCHEMA_PARAM, "invalid_json_schema"
    ),
    "slow": (formatted(SLOW), SCHEMA_PARAM, "invalid_json_schema"),
    "prefixItems and additionalItems": (
        formatted({"prefixItems": [{}], "additionalItems": False}), SCHEMA_PARAM, "invalid_json_schema"
    ),
    "prefixItems of an older draft": (
        formatted({"$schema": "http://json-schema.org/draft-07/schema#", "items": {"prefixItems": [{}]}}),
        SCHEMA_PARAM,
        "invalid_json_schema",
    ),
    "control character in an enum": (formatted({"enum": [["0\x07"]]}), SCHEMA_PARAM, "invalid_json_schema"),
    "control character in a name": (formatted({"properties": {"\x7f": {}}}), SCHEMA_PARAM, "invalid_json_schema"),
    "a draft inside": (
        formatted({"items": {"$schema": "http://json-schema.org/draft-07/schema#"}}),
        SCHEMA_PARAM,
        "invalid_json_schema",
    ),
    "unknown draft": (formatted({"$schema": "urn:x"}), SCHEMA_PARAM, "invalid_json_schema"),
    "600 optional properties": (
        formatted({"properties": {f"p{k}": True for k in range(600)}, "type": "object"}),
        SCHEMA_PARAM,
        "invalid_json_schema",
    ),
    "multipleOf": (formatted({"multipleOf": 7919}), SCHEMA_PARAM, "invalid_json_schema"),
    "multipleOf a word": (formatted({"multipleOf": "x"}), SCHEMA_PARAM, "invalid_json_schema"),
    "false": (formatted(False), SCHEMA_PARAM, "invalid_json_schema"),
    "contradiction": (
        formatted({"type": "integer", "minimum": 3, "maximum": 2}), SCHEMA_PARAM, "invalid_json_schema"
    ),
    "unknown type": (formatted({"type": "strin"}), SCHEMA_PARAM, "invalid_json_schema"),
    "properties a list": (formatted({"properties": [1]}), SCHEMA_PARAM, "invalid_json_schema"),
    "items a number": (formatted({"items": 3}), SCHEMA_PARAM, "invalid_json_schema"),
    "unknown format": (formatted({"type": "string", "format": "zork"}), SCHEMA_PARAM, "invalid_json_schema"),
    "overlapping oneOf": (
        formatted({"oneOf": [{"type": "string"}, {"maxLength": 3}]}), SCHEMA_PARAM, "invalid_json_schema"
    ),
    "options for the compiler": (
        formatted({"x-guidance": {"lenient": True}}), SCHEMA_PARAM, "invalid_json_schema"
    ),
    "a number for a schema": (formatted(3), SCHEMA_PARAM, "invalid_type"),
    "no schema": (
        chat(response_format={"type": "json_schema", "json_schema": {"name": "a"}}),
        SCHEMA_PARAM,
        "missing_required_parameter",
    ),
    "no json_schema": (
        chat(response_format={"type": "json_schema"}), "response_format.json_schema", "missing_required_parameter"
    ),
    "bad name": (
        chat(response_format={"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}),
        "response_format.json_schema.name",
        "invalid_value",
    ),
    "no type": (chat(response_format={}), "response_format.type", "missing_required_parameter"),
    "structural_tag": (chat(response_format={"type": "structural_tag"}), "response_format.type", "invalid_value"),
    "format a string": (chat(response_format="json"), "response_format", "invalid_type"),
    "open group": (structured(regex="(a"), "structured_outputs.regex", "invalid_regex"),
    "look-ahead": (structured(regex="(?=a)b"), "structured_outputs.regex", "invalid_regex"),
    "back-reference": (structured(regex=r"(a)\1"), "structured_outputs.regex", "invalid_regex"),
    "impossible": (structured(regex=r"[^\s\S]"), "structured_outputs.regex", "invalid_regex"),
    "20,000 groups": (
        structured(regex="(" * 20_000 + "a" + ")" * 20_000), "structured_outputs.regex", "invalid_regex"
    ),
    "huge regex": (structured(regex="a" * 2_000_000), "structured_outputs.regex", "invalid_regex"),
    "bad Lark": (structured(grammar="start: missing"), "structured_outputs.grammar", "invalid_grammar"),
    "bad GBNF": (structured(grammar='root ::= "a'), "structured_outputs.grammar", "invalid_grammar"),
    "endless": (structured(grammar="start: start"), "structured_outputs.grammar", "invalid_grammar"),
    "empty grammar": (structured(grammar=""), "structured_outputs.grammar", "invalid_grammar"),
    "schema in a grammar": (
        structured(grammar='start: %json {"type": "string"}'), "structured_outputs.grammar", "invalid_grammar"
    ),
    "no choice": (structured(choice=[]), "structured_outputs.choice", "invalid_choice"),
    "20,000 choices": (
        structured(choice=[str(k) for k in range(20_000)]), "structured_outputs.choice", "invalid_choice"
    ),
    "choice a string": (structured(choice="a"), "structured_outputs.choice", "invalid_type"),
    "json no JSON": (structured(json="{"), "structured_outputs.json", "invalid_json_schema"),
    "json too deep": (structured(json="[" * 10_000), "structured_outputs.json", "invalid_json_schema"),
    "json a number": (structured(json="3"), "structured_outputs.json", "invalid_json_schema"),
    "two at once": (structured(regex="a", choice=["a"]), "structured_outputs", "invalid_value"),
    "none": (structured(), "structured_outputs", "invalid_value"),
    "none but false": (structured(json_object=False), "structured_outputs", "invalid_value"),
    "an option": (
        structured(regex="a", whitespace_pattern="x"),
        "structured_outputs.whitespace_pattern",
        "unsupported_parameter",
    ),
    "both ways": (
        {**structured(regex="a"), "response_format": {"type": "json_object"}}, "structured_outputs", "invalid_value"
    ),
    "guided_regex": (chat(guided_regex="a"), "guided_regex", "unsupported_parameter"),
}  # fmt: skip

KEYWORDS = {
    "not": {},
    "if": {},
    "contains": {},
    "uniqueItems": True,
    "dependentRequired": {},
    "dependentSchemas": {},
    "propertyNames": {},
    "unevaluatedProperties": False,
    "unevaluatedItems": False,
    "minContains": 1,
    "$dynamicRef": "#",
    "nullable": True,
    "minLenght": 3,
    "minProperties": 2,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused(served: Served, name: str) -> None:
    body, param, code = REFUSED[name]
    text = json.dumps(body)
    answer = served.post(text)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert len(answer.content) < 1024
    assert not served.engine.requests


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_a_keyword_that_is_not_enforced_is_named(served: Served, keyword: str) -> None:
    schema = {"type": "object", "properties": {"x": {"items": {keyword: KEYWORDS[keyword]}}}}
    error = served.post(formatted(schema)).json()["error"]
    assert (error["param"], error["code"]) == (SCHEMA_PARAM, "invalid_json_schema")
    assert keyword in error["message"]
    assert "/properties/x/items" in error["message"]


def test_names_of_properties_are_no_keywords(served: Served) -> None:
    names: dict[str, Any] = {name: {"type": "string"} for name in ("not", "if", "x-guidance", "properties")}
    names["const"] = {"const": {"if": {"not": 1}}}
    schema = {"properties": names, "$defs": {"not": {}}, "default": {"not": 1}}
    assert served.post(formatted(schema)).status_code == 200


def test_a_10000_deep_schema_is_refused(served: Served) -> None:
    deep = '{"items":' * 10_000 + "{}" + "}" * 10_000
    body = json.dumps(formatted("DEEP")).replace('"DEEP"', deep)
    assert served.post(body).status_code == 400


@pytest.mark.parametrize(
    ("body", "accepted", "refused"),
    [
        (formatted(SCHEMA), ['{"a":1}', '{ "a": -20\n}'], ['{"a":1.5}', "{}", ' {"a":1}', '{  "a":1}', "[]"]),
        (
            formatted({"type": "object", "properties": {"a": {"type": "integer"}}}),
            ['{"a":1,"b":"x"}', '{"b\\n\\"é":"x"}'],
            ['{"b":1,"\\u0061":"x"}', '{"b":1,"a":"x"}'],
        ),
        (formatted(True), ["3", "null", '"x"', '{"a": []}'], ["", "nul"]),
        (formatted(SCHEMA, strict=False, description="d"), ['{"a":1}'], ["{}"]),
        (chat(response_format={"type": "json_object"}), ["{}", '{"a": [1, {}]}'], ["[]", "3"]),
        (structured(json_object=True), ["{}"], ["[]"]),
        (structured(json=SCHEMA), ['{"a":1}'], ["{}"]),
        (structured(json=json.dumps(SCHEMA)), ['{"a":1}'], ["{}"]),
        (structured(regex=r"\d+/\w(x|\n\")?"), ["12/a", '1/b\n"', "1/bx"], ["/a", "1/", "x1/a", "٣/a"]),
        (structured(regex="(a+)+b"), ["aab"], ["b", "aaba"]),
        (structured(regex="a{1,100000}"), ["a", "aaaa"], ["", "b"]),
        (structured(choice=["a", 'b "c"/\n|(', "é☃", ""]), ["a", 'b "c"/\n|(', "é☃", ""], ["b", "aa", "é"]),
        (structured(grammar='start: A "-" ("x" | "y")\nA: /[a-c]+/'), ["ab-x"], ["d-x", "a-"]),
        (structured(grammar='root ::= "a" [0-9]+ ("," root)?'), ["a1,a22"], ["a", "a1,"]),
    ],
)  # fmt: skip
def test_the_engine_gets_a_grammar_of_what_was_asked_for(
    served: Served, checkpoint: Path, body: dict[str, Any], accepted: list[str], refused: list[str]
) -> None:
    assert served.post(body).status_code == 200
    grammar = served.engine.requests[-1].sampling.grammar
    assert grammar is not None
    tokenizer = LLTokenizer(str(checkpoint / "tokenizer.json"))

    def matches(text: str) -> bool:
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        ids = tokenizer.tokenize_str(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    assert [text for text in accepted if not matches(text)] == []
    assert [text for text in refused if matches(text)] == []


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    "fields", [{}, {"response_format": {"type": "text"}}, {"response_format": None, "structured_outputs": None}]
)
def test_an_answer_is_free_unless_asked_otherwise(served: Served, path: str, fields: dict[str, Any]) -> None:
    asked = {"prompt": "hi"} if path == "/v1/completions" else {"messages": [user("hi")]}
    body = {**asked, **fields}
    assert served.post(body, path).status_code == 200
    assert served.engine.requests[-1].sampling.grammar is None


def test_completions_take_constraints_too(served: Served) -> None:
    body = {"prompt": "hi", "structured_outputs": {"choice": ["a"]}}
    assert served.post(body, "/v1/completions").status_code == 200
    assert served.engine.requests[-1].sampling.grammar is not None


class Person(BaseModel):
    name: str
    age: int


def test_openai_parses_into_a_pydantic_model(served: Served) -> None:
    served.say('{"name": "Ann", "age": 30}')
    completion = served.openai.chat.completions.parse(
        model="tiny-audio", messages=[{"role": "user", "content": "who?"}], response_format=Person
    )
    assert completion.choices[0].message.parsed == Person(name="Ann", age=30)
    assert served.engine.requests[-1].sampling.grammar is not None


# The compiler's process


@pytest.fixture
def compiler(checkpoint: Path) -> Any:
    made = GrammarCompiler(checkpoint, 600)
    yield made
    made.close()


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "server.structured.worker" in child.cmdline()]


def regex(compiler: GrammarCompiler, pattern: str) -> str:
    return asyncio.run(compiler.regex(pattern, "p"))


def test_a_source_that_takes_too_long_ends_and_the_next_is_compiled(compiler: GrammarCompiler) -> None:
    regex(compiler, "warm")
    started = time.monotonic()
    with pytest.raises(ApiError, match=TOO_COMPLEX) as refusal:
        asyncio.run(compiler.json_schema(SLOW, "p"))
    assert refusal.value.status == 400
    assert time.monotonic() - started >= MAX_SECONDS
    started = time.monotonic()
    with pytest.raises(ApiError, match=TOO_COMPLEX):
        asyncio.run(compiler.json_schema(SLOW, "p"))
    assert time.monotonic() - started < MAX_SECONDS, "a refusal is remembered"
    assert "abc" in regex(compiler, "abc")


def test_a_queue_of_slow_sources_holds_nobody_else_up(served: Served) -> None:
    def slow(k: int) -> None:
        schema = {"type": "object", "properties": {f"q{k}_{n}": True for n in range(5000)}}
        statuses.append(served.post(formatted(schema), timeout=30).status_code)

    statuses: list[int] = []
    threads = [threading.Thread(target=slow, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    started = time.monotonic()
    assert served.post(chat()).status_code == 200
    waited = time.monotonic() - started
    for thread in threads:
        thread.join(30)
    assert statuses == [400] * 6
    assert waited < 2 * MAX_SECONDS


def test_nothing_runs_until_it_is_needed_nor_after_the_end(compiler: GrammarCompiler) -> None:
    before = len(children())
    with pytest.raises(ApiError):
        asyncio.run(compiler.json_schema({"not": {}}, "p"))
    assert len(children()) == before
    regex(compiler, "a")
    assert len(children()) == before + 1
    compiler.close()
    assert len(children()) == before


def test_a_process_that_was_killed_is_replaced(compiler: GrammarCompiler) -> None:
    before = {child.pid for child in children()}
    regex(compiler, "a")
    [ours] = {child.pid for child in children()} - before
    os.kill(ours, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while psutil.Process(ours).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "b" in regex(compiler, "b")


def test_a_process_that_cannot_work_is_no_fault_of_the_request(tmp_path: Path) -> None:
    compiler = GrammarCompiler(tmp_path, 600)
    with pytest.raises(RuntimeError, match="status"):
        regex(compiler, "a")
    compiler.close()


def test_many_sources_at_once_leave_memory_flat(compiler: GrammarCompiler) -> None:
    before = {child.pid for child in children()}
    regex(compiler, "a")
    [ours] = {child.pid for child in children()} - before
    resident = psutil.Process(ours).memory_info().rss
    failures: list[BaseException] = []

    def many(k: int) -> None:
        try:
            for step in range(CACHE_SIZE):
                regex(compiler, f"(a+{k})+b{step}(x|yz){{1,{1000 + step}}}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=many, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert len(compiler._cache) == CACHE_SIZE
    assert psutil.Process(ours).memory_info().rss - resident < 50 << 20
