"""Tool calls in a text that arrives in pieces: the same whatever the pieces, and nothing lost."""

from __future__ import annotations

import json
import time
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.tools.parser import CallDelta, StreamingToolParser, joined_calls

NAMES = {"get_weather", "f"}
WEATHER = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln <tool_call> \\"}"}}\n</tool_call>'
CITY = '{"city": "Köln <tool_call> \\"}"}'

Calls = list[tuple[str, str]]


def run(pieces: list[str], *, is_eager: bool = False, max_calls: int | None = None) -> tuple[str, Calls]:
    """Feed the pieces. -> text and calls, the latter as (name, arguments)."""
    parser = StreamingToolParser(NAMES, is_eager=is_eager, max_calls=max_calls)
    text, deltas = "", []
    for piece in pieces:
        parsed = parser.feed(piece)
        text += parsed.text
        deltas += parsed.calls
        if parser.is_done:
            break
    rest = parser.finish()
    assert not rest.calls
    calls = joined_calls(deltas)
    assert [call.index for call in calls] == list(range(len(calls))) == list(range(parser.num_calls))
    assert len({call.id for call in calls}) == len(calls)
    assert all(call.id.startswith("call_") for call in calls)
    return text + rest.text, [(call.name, call.arguments) for call in calls]


def cut(text: str, places: set[int]) -> list[str]:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[start:end] for start, end in pairwise(edges)]


def test_a_call_and_the_text_before_it() -> None:
    assert run([f"Let me see.\n{WEATHER}"]) == ("Let me see.", [("get_weather", CITY)])


def test_calls_follow_each_other() -> None:
    f = '<tool_call>{"arguments": {}, "name": "f"}</tool_call>'
    assert run([f"{f}\n{WEATHER} {f}\n"]) == ("", [("f", "{}"), ("get_weather", CITY), ("f", "{}")])


def test_text_after_a_call_is_text() -> None:
    assert run([f"{WEATHER}\nDone. "]) == ("\nDone.", [("get_weather", CITY)])


@pytest.mark.parametrize("tail", ["", "\n", "</tool_", "\n</tool_call>\n\n"])
def test_the_closing_tag_may_be_missing(tail: str) -> None:
    assert run(['<tool_call>{"name": "f", "arguments": {"a": [1, {}]}}' + tail]) == ("", [("f", '{"a": [1, {}]}')])


MALFORMED = [
    "<tool_call>",
    "<tool_call>\n",
    "<tool_call>f()</tool_call>",
    '<tool_call>\n{"name": "f", "arguments": {"a": 1}\n</tool_call>',  # a brace is missing
    '<tool_call>{"name": "f", "arguments": {"a": 1}',  # cut by a limit
    '<tool_call>{"name": "g", "arguments": {}}</tool_call>',  # no such function
    '<tool_call>{"name": "f"}</tool_call>',
    '<tool_call>{"name": "f", "arguments": "a"}</tool_call>',
    '<tool_call>{"name": ["f"], "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
    "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>",
    "<tool_call>{]</tool_call>",
    "<tool_call>" + '{"a":' * 5000,
    "<tool_call>" + '{"a":' * 5000 + "1" + "}" * 5000,
    "<tool_cal",
    "a </tool_call> b",
    "  \n",
]


@pytest.mark.parametrize("text", MALFORMED)
def test_what_is_no_call_is_given_back(text: str) -> None:
    assert run([text]) == (text, [])
    assert run(list(text)) == (text, [])


def test_a_call_after_a_malformed_one_is_found() -> None:
    broken = '<tool_call>{"name": "f", "arguments": {"a": 1}'
    assert run([f"{broken}\n{WEATHER}"]) == (broken, [("get_weather", CITY)])


pieces_of_text = st.one_of(
    st.sampled_from([WEATHER, *MALFORMED[:12], "<tool_call>", "</tool_call>", "\n", " ", "{", '"', "<", "\\"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
)
answers = st.lists(pieces_of_text, max_size=5).map("".join)


@settings(deadline=None)
@given(answer=answers, places=st.sets(st.integers(0, 10**6), max_size=12), limit=st.sampled_from([None, 1]))
@example(answer=WEATHER + "\n" + WEATHER, places=set(range(300)), limit=None)
def test_the_pieces_do_not_matter(answer: str, places: set[int], limit: int | None) -> None:
    whole = run([answer], max_calls=limit)
    assert run(cut(answer, places), max_calls=limit) == whole
    assert run(list(answer), max_calls=limit) == whole


@settings(deadline=None)
@given(answer=answers)
def test_nothing_is_lost(answer: str) -> None:
    text, calls = run([answer])
    if not calls:
        assert text == answer


@pytest.mark.parametrize("place", range(len(WEATHER) + 1))
def test_every_split_of_a_call(place: int) -> None:
    pieces = ["Well.", *cut(f"\n{WEATHER}", {place})]
    assert run(pieces) == ("Well.", [("get_weather", CITY)])
    assert run(pieces, is_eager=True) == ("Well.", [("get_weather", CITY)])


def test_text_is_held_back_only_while_it_may_begin_a_call() -> None:
    parser = StreamingToolParser(NAMES)
    fed = ["a <b", "> ", "\n<tool", "s> ", "x", "<tool_call>", "{", '"', "ok", "\n<tool_call>f"]
    shown = [parser.feed(piece).text for piece in fed]
    assert shown == ["a <b", ">", "", " \n<tools>", " x", "", "", "", "", ""]
    assert parser.finish().text == '<tool_call>{"ok\n<tool_call>f'


def test_guaranteed_arguments_are_shown_as_they_come() -> None:
    parser = StreamingToolParser(NAMES, is_eager=True)
    shown = [parser.feed(char).calls for char in WEATHER]
    deltas = [delta for calls in shown for delta in calls]
    assert (deltas[0].name, deltas[0].arguments) == ("get_weather", "")
    assert deltas[1:] == [CallDelta(0, char) for char in CITY]
    assert len([calls for calls in shown if calls]) == len(CITY)  # the header comes with the first of them


def test_one_call_at_most() -> None:
    assert run([WEATHER + WEATHER], max_calls=1) == ("", [("get_weather", CITY)])
    parser = StreamingToolParser(NAMES, max_calls=1)
    assert not parser.is_done
    parser.feed(WEATHER.removesuffix("\n</tool_call>"))
    assert parser.is_done


@pytest.mark.parametrize("text", ["<tool_call>{" * 20_000, " " * 3_000 + "\n<tool_cal" * 3_000, '"' * 50_000])
def test_hostile_answers_take_linear_time(text: str) -> None:
    started = time.monotonic()
    run(cut(text, set(range(0, len(text), 4))))
    assert time.monotonic() - started < 5


def test_arguments_are_json() -> None:
    _, [(_, arguments)] = run(['<tool_call>{"name": "f", "arguments": {"é": [1.5, true, null, "\\ud83c\\udf88"]}}'])
    assert json.loads(arguments) == {"é": [1.5, True, None, "🎈"]}
