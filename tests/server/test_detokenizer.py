"""Detokenizing: the split of the ids never shows, and no stop string does."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Encoder

from server.generation.detokenizer import IncrementalDetokenizer, StopMatcher
from server.prompt.tokenizer import Tokenizer

ids_strategy = st.lists(st.integers(0, 420), max_size=30)


def run(detokenizer: IncrementalDetokenizer, ids: list[int]) -> list[str]:
    pieces = []
    for token_id in ids:
        pieces.append(detokenizer.push(token_id))
        if detokenizer.stop_string is not None:
            return pieces
    return [*pieces, detokenizer.finish()]


@settings(max_examples=100, deadline=None)
@given(ids=ids_strategy, skip=st.booleans())
def test_any_ids_give_what_tokenizers_gives(
    tokenizer: Tokenizer, encoder: Encoder, ids: list[int], skip: bool
) -> None:
    pieces = run(IncrementalDetokenizer(tokenizer, skip_special_tokens=skip), ids)
    assert "".join(pieces) == encoder.decode(ids, skip_special_tokens=skip)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_no_half_characters(tokenizer: Tokenizer, text: str) -> None:
    pieces = run(IncrementalDetokenizer(tokenizer), [id_ for char in text for id_ in tokenizer.encode(char)])
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


stops_strategy = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4)


def first_stop(text: str, stops: list[str]) -> tuple[int, int] | None:
    """The stop string that is complete first; of several, the one that began first. -> (start, end)"""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts), end
    return None


@settings(max_examples=200, deadline=None)
@given(pieces=st.lists(st.text("abc", max_size=4), max_size=10), stops=stops_strategy, include=st.booleans())
def test_stop_strings_whatever_the_split(pieces: list[str], stops: list[str], include: bool) -> None:
    whole = "".join(pieces)
    found = first_stop(whole, stops)
    matcher = StopMatcher(stops, include_match=include)
    shown = ""
    for piece in pieces:
        shown += matcher.feed(piece)
        if not include:
            assert not any(stop in shown for stop in stops)
        if matcher.matched is not None:
            break
    else:
        shown += matcher.flush()
    if found is None:
        assert (shown, matcher.matched) == (whole, None)
    else:
        assert matcher.matched == whole[slice(*found)]
        assert shown == whole[: found[1] if include else found[0]]


def test_text_is_only_held_back_while_in_doubt() -> None:
    matcher = StopMatcher(["STOP"])
    assert matcher.feed("a ST") == "a "
    assert matcher.feed("A") == "STA"
    assert matcher.feed("b") == "b"


@pytest.mark.parametrize("min_tokens", [0, 2, 5])
def test_stop_strings_wait_for_min_tokens(tokenizer: Tokenizer, min_tokens: int) -> None:
    ids = [id_ for char in "xxxxxx" for id_ in tokenizer.encode(char)]
    pieces = run(IncrementalDetokenizer(tokenizer, ["x"], min_tokens=min_tokens), ids)
    assert "".join(pieces) == "x" * min_tokens


def test_ids_past_the_vocabulary_are_nothing(tokenizer: Tokenizer) -> None:
    assert run(IncrementalDetokenizer(tokenizer), [10**6, -1]) == ["", "", ""]
