"""What ends with `stop` satisfies its constraint: made-up schemas, hot sampling, random weights; and HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import BadRequestError
from pydantic import BaseModel, Field

from engine.client import InlineEngineClient
from engine.messages import EngineArgs, FinishReason
from server.errors import ApiError
from server.prompt.tokenizer import Tokenizer
from server.structured.compiler import GrammarCompiler
from tests.integration.conftest import ServerProcess, text
from tests.reference import BUNDLED, Prompt

TOKENIZER = Tokenizer.from_folder(BUNDLED)
ENDS = (TOKENIZER.special["<|im_end|>"], TOKENIZER.special["<|endoftext|>"])

names = st.sampled_from(["a", "b", "name", "x y", 'q"', "é", "$ref", "type"])
small = st.integers(0, 4)


def bounds(low: str, high: str) -> st.SearchStrategy[dict[str, int]]:
    return st.tuples(small, small).map(lambda pair: {low: min(pair), high: max(pair)})


strings = st.one_of(
    bounds("minLength", "maxLength"),
    st.sampled_from(
        [
            {"pattern": "^[a-c]{1,3}$"},
            {"pattern": r"\d-\w"},
            {"format": "date"},
            {"format": "uuid"},
            {"format": "ipv4"},
            {},
        ]
    ),
).map(lambda more: {"type": "string", **more})
numbers = st.one_of(
    bounds("minimum", "maximum"),
    st.tuples(st.integers(-50, 0), st.integers(1, 50)).map(
        lambda pair: {"exclusiveMinimum": pair[0], "exclusiveMaximum": pair[1]}
    ),
    st.sampled_from([{"multipleOf": 3}, {"minimum": -2.5, "maximum": 7.25}, {}]),
).flatmap(lambda more: st.sampled_from(["integer", "number"]).map(lambda kind: {"type": kind, **more}))
values = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.text(max_size=4))
leaves = st.one_of(
    strings,
    numbers,
    st.just({"type": "boolean"}),
    st.just({"type": ["null", "integer"]}),
    values.map(lambda value: {"const": value}),
    st.lists(values, min_size=1, max_size=3).map(lambda options: {"enum": options}),
    st.just(True),
)


def objects(schemas: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        lambda properties, required, additional: {
            "type": "object",
            "properties": properties,
            "required": sorted(set(required) & set(properties)),
            "additionalProperties": additional,
        },
        st.dictionaries(names, schemas, max_size=3),
        st.lists(names, max_size=3),
        st.one_of(st.just(False), schemas),
    )


def compounds(schemas: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    arrays = st.tuples(schemas, bounds("minItems", "maxItems")).map(
        lambda pair: {"type": "array", "items": pair[0], **pair[1]}
    )
    tuples = st.lists(schemas, min_size=1, max_size=2).map(
        lambda items: {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    )
    unions = st.lists(schemas, min_size=1, max_size=3).map(lambda options: {"anyOf": options})
    exclusive = st.just({"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 2}]})
    referring = schemas.map(lambda schema: {"type": "array", "items": {"$ref": "#/$defs/z"}, "$defs": {"z": schema}})
    return st.one_of(objects(schemas), arrays, tuples, unions, exclusive, referring)


def at_the_top(schema: Any) -> Any:
    """References are resolved from the top: definitions belong there."""
    if not isinstance(schema, dict):
        return schema
    definitions: dict[str, Any] = {}

    def lift(node: Any) -> Any:
        if isinstance(node, list):
            return [lift(item) for item in node]
        if not isinstance(node, dict):
            return node
        lifted = {key: lift(value) for key, value in node.items() if key != "$defs"}
        if "$defs" in node:
            name = f"d{len(definitions)}"
            definitions[name] = {}
            definitions[name] = lift(node["$defs"]["z"])
            lifted["items"] = {"$ref": f"#/$defs/{name}"}
        return lifted

    lifted = lift(schema)
    return {**lifted, "$defs": definitions} if definitions else lifted


schemas = st.recursive(leaves, compounds, max_leaves=6).map(at_the_top)


class Writer:
    """An engine with random weights, which writes what it is told to, hot."""

    def __init__(self, folder: Path) -> None:
        self.loop = asyncio.new_event_loop()
        args = EngineArgs(str(folder), device="cpu", num_threads=1, max_num_seqs=8)
        self.engine = self.loop.run_until_complete(InlineEngineClient.start(args))
        self.compiler = GrammarCompiler(folder, self.engine.info.vocab_size)
        self.count = 0

    def close(self) -> None:
        self.loop.run_until_complete(self.engine.close())
        self.loop.close()
        self.compiler.close()

    def compile(self, kind: str, source: Any) -> str:
        grammar: str = self.loop.run_until_complete(getattr(self.compiler, kind)(source, "p"))
        return grammar

    def write(self, grammar: str, num_answers: int = 4, max_tokens: int = 80) -> list[str]:
        """-> the answers that stopped."""
        answers = self.loop.run_until_complete(self._gather(grammar, num_answers, max_tokens))
        return [answer for answer in answers if answer is not None]

    async def _gather(self, grammar: str, num_answers: int, max_tokens: int) -> list[str | None]:
        return await asyncio.gather(*(self._write(grammar, k, max_tokens) for k in range(num_answers)))

    async def _write(self, grammar: str, seed: int, max_tokens: int) -> str | None:
        self.count += 1
        request = Prompt.of(5, 6, 7).request(
            f"w{self.count}",
            max_tokens=max_tokens,
            temperature=(0.0, 1.0, 2.0)[seed % 3],
            seed=seed,
            stop_token_ids=ENDS,
            grammar=grammar,
        )
        ids: list[int] = []
        async for output in self.engine.generate(request):
            ids += output.new_token_ids
        if output.finish_reason is not FinishReason.STOP:
            assert output.finish_reason is FinishReason.LENGTH
            return None
        return b"".join(TOKENIZER.bytes_of(token_id) for token_id in ids if token_id not in ENDS).decode()


@pytest.fixture(scope="module")
def writer(gqa_folder: Path) -> Iterator[Writer]:
    made = Writer(gqa_folder)
    yield made
    made.close()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=schemas)
def test_what_stops_satisfies_its_schema(writer: Writer, schema: Any) -> None:
    with contextlib.suppress(ApiError):  # a 400: nothing satisfies it, or it cannot be honoured
        check_answers(writer, schema)


def check_answers(writer: Writer, schema: Any) -> None:
    grammar = writer.compile("json_schema", schema)
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    for answer in writer.write(grammar):
        validator.validate(json.loads(answer))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "integer", "minimum": -3, "maximum": 40}, "minItems": 2, "maxItems": 3},
        {"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 1}}},
        {"type": "object", "patternProperties": {"^x[0-9]$": {"type": "null"}}, "additionalProperties": False},
        {"allOf": [{"type": "object", "properties": {"a": {"minimum": 3}}, "required": ["a"]},
                   {"properties": {"a": {"type": "integer", "maximum": 5}}, "additionalProperties": False}]},
        {"type": "object", "required": ["k"], "additionalProperties": {"enum": [1, 2]}, "maxProperties": 1},
    ],
)  # fmt: skip
def test_schemas_that_hypothesis_does_not_make(writer: Writer, schema: dict[str, Any]) -> None:
    answers = writer.write(writer.compile("json_schema", schema), num_answers=6)
    assert answers
    for answer in answers:
        jsonschema.validate(json.loads(answer), schema)


@pytest.mark.parametrize(
    "pattern",
    [
        r"[ab]{2,5}",
        r"(a+)+b",
        r"\d{3}-\w{1,4}@(x|yy)\.com",
        r"(red|green)( and (red|green)){0,3}\.?",
        r"[^\x00-\x7f]{1,2}",
        r"(?i)yes|no",
        r"-?(0|[1-9]\d{0,4})(\.\d{1,3})?",
    ],
)
def test_what_stops_matches_its_regex(writer: Writer, pattern: str) -> None:
    answers = writer.write(writer.compile("regex", pattern), num_answers=6)
    assert answers
    assert [answer for answer in answers if not re.fullmatch(pattern, answer, re.ASCII)] == []


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(options=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=1, max_size=5))
def test_what_stops_is_one_of_the_choices(writer: Writer, options: list[str]) -> None:
    answers = writer.write(writer.compile("choice", options))
    assert len(answers) == 4
    assert set(answers) <= set(options)


# Over HTTP, through openai's client


class Order(BaseModel):
    item: Literal["tea", "coffee"]
    amount: int = Field(ge=1, le=9)
    sizes: list[Literal["S", "M"]] = Field(max_length=2)


def ask(server: ServerProcess, **fields: Any) -> Any:
    options = {"max_tokens": 200, "temperature": 1.5, "seed": 3, **fields}
    create = server.openai.chat.completions.create
    return create(model="random", messages=[{"role": "user", "content": [text("An order, please.")]}], **options)


def test_openai_parses_a_pydantic_model(reference_server: ServerProcess) -> None:
    for seed in range(3):
        completion = reference_server.openai.chat.completions.parse(
            model="random",
            messages=[{"role": "user", "content": "An order, please."}],
            response_format=Order,
            temperature=1.5,
            seed=seed,
        )
        assert completion.choices[0].finish_reason == "stop"
        assert isinstance(completion.choices[0].message.parsed, Order)


def test_a_stream_carries_the_same_answer(reference_server: ServerProcess) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "order", "schema": Order.model_json_schema()}}
    whole = ask(reference_server, response_format=schema).choices[0]
    chunks = list(ask(reference_server, response_format=schema, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason == "stop"
    Order.model_validate_json(whole.message.content)


def test_logprobs_are_of_the_tokens_of_the_answer(reference_server: ServerProcess) -> None:
    choice = ask(
        reference_server,
        logprobs=True,
        top_logprobs=2,
        extra_body={"structured_outputs": {"choice": ["left", "up"]}},
    ).choices[0]
    assert choice.message.content in ("left", "up")
    assert b"".join(bytes(token.bytes) for token in choice.logprobs.content).decode() == choice.message.content
    assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)


def test_stop_strings_and_the_token_limit_may_cut_an_answer(reference_server: ServerProcess) -> None:
    whole = {"structured_outputs": {"regex": "[ab]{30}c[ab]{30}"}}
    stopped = ask(reference_server, stop="c", extra_body=whole).choices[0]
    assert stopped.finish_reason == "stop"
    assert re.fullmatch("[ab]{30}", stopped.message.content)
    cut = ask(reference_server, max_tokens=5, extra_body=whole).choices[0]
    assert cut.finish_reason == "length"
    assert re.fullmatch("[ab]+", cut.message.content)


def test_completions_follow_a_grammar(reference_server: ServerProcess) -> None:
    answer = reference_server.openai.completions.create(
        model="random",
        prompt="say",
        max_tokens=40,
        temperature=1.5,
        extra_body={"structured_outputs": {"grammar": 'root ::= ("ab" | "cd") ("-" [0-9])? "!"'}},
    )
    assert answer.choices[0].finish_reason == "stop"
    assert re.fullmatch(r"(ab|cd)(-[0-9])?!", answer.choices[0].text)


def test_a_bad_schema_then_a_good_one(reference_server: ServerProcess) -> None:
    for schema in ({"$ref": "#"}, {"type": "object", "properties": {f"p{k}": True for k in range(6000)}}):
        bad = {"type": "json_schema", "json_schema": {"name": "bad", "schema": schema}}
        with pytest.raises(BadRequestError) as refusal:
            ask(reference_server, response_format=bad)
        assert refusal.value.param == "response_format.json_schema.schema"
        assert refusal.value.code == "invalid_json_schema"
    answer = ask(reference_server, response_format={"type": "json_object"}, max_tokens=30, temperature=0)
    assert answer.choices[0].message.content.startswith("{")
