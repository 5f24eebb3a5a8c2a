"""Prompt lookup against a search that looks everywhere, and its cost where a text is long."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.messages import AudioClip, EngineRequest, SamplingParams
from engine.prompt_lookup import MAX_CANDIDATES, PromptLookup
from engine.sequence import Sequence

AUDIO = 9


def sequence(prompt: list[int], clips: tuple[AudioClip, ...] = (), name: str = "r") -> Sequence:
    return Sequence(EngineRequest(name, tuple(prompt), SamplingParams(max_tokens=1000), clips), seed=0)


def clip(offset: int, num_tokens: int) -> AudioClip:
    return AudioClip(np.zeros(640 * num_tokens, dtype=np.float32), "clip", offset, num_tokens)


def search(token_ids: list[object], min_ngram: int, max_ngram: int, count: int) -> tuple[int, ...]:
    """By the definition: look at every place, newest first."""
    end = len(token_ids)

    def agreement(place: int) -> int:
        length = 0
        while length < min(place, max_ngram) and token_ids[place - 1 - length] == token_ids[end - 1 - length]:
            length += 1
        return length

    places = [place for place in range(end - 1, 0, -1) if agreement(place) >= min_ngram][:MAX_CANDIDATES]
    if not places:
        return ()
    text = list(token_ids)
    best = max(places, key=agreement)  # of equal ones the first
    draft: list[int] = []
    for place in range(best, best + count):
        if not isinstance(text[place], int):
            break
        draft.append(text[place])
        text.append(text[place])
    return tuple(draft)


@given(
    prompt=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    added=st.lists(st.lists(st.integers(0, 3), max_size=5), max_size=12),
    spans=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 6)), max_size=3),
    min_ngram=st.integers(1, 4),
    longer=st.integers(0, 5),
    count=st.integers(1, 7),
)
def test_it_finds_what_a_search_of_everything_finds(
    prompt: list[int], added: list[list[int]], spans: list[tuple[int, int]], min_ngram: int, longer: int, count: int
) -> None:
    spans = [(start, length) for start, length in sorted(spans) if start + length <= len(prompt)]
    spans = spans[:1] + [after for before, after in pairwise(spans) if sum(before) <= after[0]]
    marked: list[object] = list(prompt)
    clips = []
    for start, length in spans:
        if clips and start < clips[-1].offset + clips[-1].num_tokens:
            continue
        clips.append(clip(start, length))
        prompt[start : start + length] = [AUDIO] * length
        marked[start : start + length] = [object() for _ in range(length)]
    made = sequence(prompt, tuple(clips))
    lookup = PromptLookup(min_ngram, min_ngram + longer)
    for piece in [[], *added]:
        made.token_ids += piece
        marked += piece
        assert lookup.propose(made, count) == search(marked, min_ngram, min_ngram + longer, count)


def test_the_place_that_agrees_longest_wins_over_a_newer_one() -> None:
    made = sequence([1, 2, 3, 40, 7, 2, 3, 50, 1, 2, 3])
    assert PromptLookup(2, 2).propose(made, 1) == (50,)
    assert PromptLookup(2, 3).propose(made, 3) == (40, 7, 2)


def test_a_repetition_goes_on() -> None:
    assert PromptLookup(2, 8).propose(sequence([5, 6, 7, 5, 6]), 5) == (7, 5, 6, 7, 5)


def test_sequences_are_told_apart_and_forgotten() -> None:
    lookup = PromptLookup(1, 1)
    first, second = sequence([1, 2, 1], name="a"), sequence([1, 3, 1], name="b")
    assert (lookup.propose(first, 1), lookup.propose(second, 1)) == ((2,), (3,))
    lookup.release(first.sequence_id)
    assert lookup.propose(sequence([1, 4, 1], name="a"), 1) == (4,)  # another of the same name
    assert lookup.propose(second, 1) == (3,)


def test_a_step_costs_little_whatever_the_text() -> None:
    """64 sequences of 8,192 tokens: random ones, and ones whose newest pairs stood before at thousands of places."""
    generator = np.random.default_rng(0)
    pair = [7, 8]
    hostile = [token for k in range(2730) for token in (*pair, 100 + k)]
    texts = [hostile + pair if k % 2 else generator.integers(0, 1000, 8192).tolist() for k in range(64)]
    sequences = [sequence(text, name=str(k)) for k, text in enumerate(texts)]
    lookup = PromptLookup(2, 8)
    for made in sequences:
        lookup.propose(made, 4)
    taken = []
    for step in range(30):
        for made in sequences:
            made.token_ids += (5000 + step, *pair)
        started = time.process_time()
        for made in sequences:
            lookup.propose(made, 4)
        taken.append(time.process_time() - started)
    assert min(taken) < 3e-3, "it takes half a millisecond on an idle core"
