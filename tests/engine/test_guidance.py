"""Matchers and masks: only what the grammar allows, ends where it may end, and each sequence for itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from llguidance import LLMatcher
from numpy.typing import NDArray

from engine.answer import SampledToken
from engine.core import EngineCore
from engine.guidance import NO_TOKEN, NOT_COMPILED, Guidance, TokenMasks
from engine.messages import EngineArgs, EngineOutput, FinishReason
from engine.sample_row import SampleRow
from engine.sequence import Sequence
from server.prompt.tokenizer import Tokenizer
from tests.reference import BUNDLED, Prompt, special_id

EOS = special_id("<|im_end|>")
OTHER_EOS = special_id("<|endoftext|>")
VOCAB_SIZE = 1536
TOKENIZER = Tokenizer.from_folder(BUNDLED)
WORDS = "start: /(yes|no|nobody)/"
STARS = "start: /\\*+/"


def sequence(name: str, grammar: str, **sampling: object) -> Sequence:
    sampling.setdefault("stop_token_ids", (EOS, OTHER_EOS))
    return Sequence(Prompt.of(1, 2).request(name, grammar=grammar, **sampling), seed=0)


@pytest.fixture
def guidance() -> Guidance:
    return Guidance(BUNDLED / "tokenizer.json", VOCAB_SIZE, (EOS, OTHER_EOS))


def compiled(guidance: Guidance, *sequences: Sequence) -> None:
    for one in sequences:
        guidance.compile([one])
    taken: list[tuple[Sequence, str | None]] = []
    while guidance.is_compiling:
        taken += guidance.take_compiled(5)
    assert taken == [(one, None) for one in sequences]


def masks_of(guidance: Guidance, *sequences: Sequence) -> TokenMasks:
    future = guidance.fill([SampleRow(one) for one in sequences])
    assert future is not None
    return future.result(5)


def allowed(masks: TokenMasks, row: int = 0) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(masks.allowed[row], bitorder="little")).tolist())


def texts(ids: set[int]) -> set[bytes]:
    return {TOKENIZER.bytes_of(token_id) for token_id in ids}


def advance(guidance: Guidance, token_id: int, name: str = "r", index: int = 0) -> SampledToken:
    """As if one sequence had sampled a token."""
    (token,) = guidance.advance({(name, index): (SampledToken(token_id),)})[name, index]
    return token


def push(guidance: Guidance, name: str, text: str, index: int = 0) -> SampledToken:
    """Sample the tokens of a text. -> the last one."""
    token = SampledToken(-1)
    for token_id in TOKENIZER.encode(text):
        token = advance(guidance, token_id, name, index)
        assert token.error is None
    return token


def test_only_prefixes_of_what_the_grammar_matches_are_allowed(guidance: Guidance) -> None:
    one = sequence("r", WORDS)
    compiled(guidance, one)
    ids = allowed(masks_of(guidance, one))
    assert ids
    assert all(any(word.startswith(text) for word in (b"yes", b"no", b"nobody")) for text in texts(ids))
    assert all(text for text in texts(ids)), "ids without a token are never allowed"


def test_an_answer_may_end_where_the_grammar_may_and_nowhere_else(guidance: Guidance) -> None:
    one = sequence("r", STARS)
    compiled(guidance, one)
    assert not allowed(masks_of(guidance, one)) & {EOS, OTHER_EOS}
    assert not push(guidance, "r", "*").complete
    assert allowed(masks_of(guidance, one)) >= {EOS, OTHER_EOS}
    assert advance(guidance, OTHER_EOS).complete


def test_an_answer_to_which_nothing_can_be_added_is_complete(guidance: Guidance) -> None:
    one = sequence("r", WORDS)
    compiled(guidance, one)
    assert not push(guidance, "r", "no").complete
    assert push(guidance, "r", "body").complete


@pytest.mark.parametrize("stop_token_ids", [(), (special_id("<|im_start|>"), 300), (EOS,)])
def test_ends_are_the_control_tokens_that_the_request_stops_at(
    guidance: Guidance, stop_token_ids: tuple[int, ...]
) -> None:
    one = sequence("r", STARS, stop_token_ids=stop_token_ids)
    compiled(guidance, one)
    push(guidance, "r", "**")
    ids = allowed(masks_of(guidance, one))
    assert {token_id for token_id in ids if token_id in TOKENIZER.special_ids} == set(stop_token_ids[:1])
    assert 300 not in ids


def test_padding_of_the_embedding_is_no_end(guidance: Guidance) -> None:
    one = sequence("r", STARS, stop_token_ids=(VOCAB_SIZE - 1, EOS))
    compiled(guidance, one)
    push(guidance, "r", "*")
    assert max(allowed(masks_of(guidance, one))) == EOS


@pytest.mark.parametrize("sampling", [{}, {"min_tokens": 5}, {"stop_token_ids": ()}])
def test_the_end_is_forced_when_nothing_else_is_left(guidance: Guidance, sampling: dict[str, object]) -> None:
    one = sequence("r", "start: //", **sampling)
    compiled(guidance, one)
    masks = masks_of(guidance, one)
    [(row, token_id)] = masks.forced
    assert (row, token_id in (EOS, OTHER_EOS)) == (0, True)
    assert advance(guidance, token_id).complete


def test_a_grammar_wins_over_min_tokens(guidance: Guidance) -> None:
    """Where all that may follow are stop ids, one of them follows, and the answer goes on."""
    [star] = TOKENIZER.encode("*")
    one = sequence("r", 'start: "*" "x" "y"', min_tokens=9, stop_token_ids=(star, EOS))
    compiled(guidance, one)
    assert masks_of(guidance, one).forced == ((0, star),)
    assert not push(guidance, "r", "*").complete
    assert masks_of(guidance, one).forced == ()


def test_each_choice_of_a_request_goes_its_own_way(guidance: Guidance) -> None:
    first = sequence("r", WORDS)
    second = Sequence(first.request, seed=1, index=1)
    guidance.compile([first, second])
    taken = []
    while guidance.is_compiling:
        taken += guidance.take_compiled(5)
    assert taken == [(first, None), (second, None)]
    push(guidance, "r", "no")
    push(guidance, "r", "no", index=1)
    assert push(guidance, "r", "body").complete
    assert allowed(masks_of(guidance, second)) == {EOS, OTHER_EOS} | {
        token_id for token_id, text in enumerate(TOKENIZER.token_bytes) if text and b"body".startswith(text)
    }
    assert push(guidance, "r", "body", index=1).complete


def test_an_abort_while_compiling_leaves_nothing(guidance: Guidance) -> None:
    guidance.compile([sequence("r", WORDS)])
    guidance.abort("r")
    assert not guidance.is_compiling
    assert guidance.take_compiled(0) == []


def test_sequences_without_a_grammar_have_no_mask(guidance: Guidance) -> None:
    free, bound = sequence("free", WORDS), sequence("bound", WORDS)
    compiled(guidance, bound)
    assert guidance.fill([SampleRow(free)]) is None
    assert masks_of(guidance, free, bound, free).rows == (1,)
    guidance.release(("bound", 0))
    assert guidance.fill([SampleRow(bound)]) is None


def test_a_token_that_the_grammar_does_not_allow_is_an_error(guidance: Guidance) -> None:
    one = sequence("r", WORDS)
    compiled(guidance, one)
    assert advance(guidance, TOKENIZER.encode("x")[0]).error == NO_TOKEN
    masks_of(guidance, one)
    assert advance(guidance, TOKENIZER.encode("y")[0]).error == NO_TOKEN


def test_what_cannot_be_compiled_is_handed_back(guidance: Guidance) -> None:
    bad = sequence("bad", "start: missing")
    guidance.compile([bad])
    assert guidance.knows("bad")
    while guidance.is_compiling:
        taken = guidance.take_compiled(5)
    assert taken == [(bad, NOT_COMPILED)]


def test_masks_of_a_batch_are_those_of_its_rows(guidance: Guidance) -> None:
    batch = [sequence(f"r{k}", grammar) for k, grammar in enumerate([WORDS, STARS, WORDS, STARS])]
    compiled(guidance, *batch)
    push(guidance, "r2", "no")
    push(guidance, "r3", "*")
    together = masks_of(guidance, *batch)
    alone: list[NDArray[np.uint8]] = [masks_of(guidance, one).allowed[0] for one in batch]
    assert np.array_equal(together.allowed, np.stack(alone))


# The engine around it


@pytest.fixture(scope="module")
def core(gqa_folder: Path) -> EngineCore:
    return EngineCore.build(EngineArgs(str(gqa_folder), device="cpu", num_threads=1, seed=7))


def run(core: EngineCore) -> dict[str, tuple[str, EngineOutput]]:
    """Until nothing is left. -> the text and the last output of each request."""
    ids: dict[str, list[int]] = {}
    last: dict[str, EngineOutput] = {}
    while core.has_work:
        for output in core.step():
            ids.setdefault(output.request_id, []).extend(output.new_token_ids)
            last[output.request_id] = output
        core.scheduler.check_integrity()
    visible = {
        name: [token_id for token_id in found if token_id not in TOKENIZER.special_ids]
        for name, found in ids.items()
    }
    return {
        name: (b"".join(map(TOKENIZER.bytes_of, visible[name])).decode(errors="replace"), last[name])
        for name in last
    }


def grammar_of(pattern: str) -> str:
    return LLMatcher.grammar_from_regex(pattern)


PATTERN = r"[a-c]{2,9}-[0-9]{3}(x|yz)*!?"


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 2.0, "top_k": 50},
        {"temperature": 2.0, "top_p": 0.7},
        {"temperature": 2.0, "repetition_penalty": 1.5, "presence_penalty": 2.0},
        {"temperature": 1.0, "logit_bias": ((TOKENIZER.encode("q")[0], 100.0),)},
        {"temperature": 2.0, "min_tokens": 30, "logprobs": 2},
        {"temperature": 2.0, "stop_token_ids": ()},
    ],
)
def test_answers_that_stop_match(core: EngineCore, sampling: dict[str, object]) -> None:
    given = {"stop_token_ids": (EOS,), **sampling}
    for k in range(6):
        request = Prompt.of(3, 4, k).request(f"r{k}", grammar=grammar_of(PATTERN), max_tokens=60, seed=k, **given)
        core.add_request(request)
    answers = run(core).values()
    stopped = [text for text, last in answers if last.finish_reason is FinishReason.STOP]
    assert stopped
    assert all(re.fullmatch(PATTERN, text) for text in stopped)
    assert {last.finish_reason for _, last in answers} <= {FinishReason.STOP, FinishReason.LENGTH}


def test_a_grammar_changes_nothing_for_others(core: EngineCore) -> None:
    def add_free() -> None:
        for k in range(3):
            core.add_request(Prompt.of(9, k).request(f"free{k}", max_tokens=12, temperature=1.0, seed=k))

    add_free()
    alone = {name: text for name, (text, _) in run(core).items()}
    for k in range(2):
        core.add_request(Prompt.of(5, k).request(f"bound{k}", max_tokens=30, grammar=WORDS, stop_token_ids=(EOS,)))
    core.add_request(Prompt.of(5, 6).request("bad", max_tokens=30, grammar="start: missing"))
    add_free()
    together = run(core)
    assert {name: together[name][0] for name in alone} == alone
    assert together["bad"][1].error == NOT_COMPILED
    assert {together[f"bound{k}"][0] for k in range(2)} <= {"yes", "no", "nobody"}


def test_a_grammar_that_cannot_go_on_ends_its_request_alone(core: EngineCore) -> None:
    stuck = grammar_of("(.*a.{500}.*b.{500}){10}")  # its states multiply
    core.add_request(Prompt.of(1, 2).request("stuck", grammar=stuck, max_tokens=900, temperature=2.0, seed=1))
    core.add_request(Prompt.of(1, 2).request("free", max_tokens=300))
    answers = run(core)
    assert answers["stuck"][1].error == NO_TOKEN
    assert answers["free"][1].finish_reason is FinishReason.LENGTH


def test_an_aborted_request_leaves_nothing(core: EngineCore) -> None:
    core.add_request(Prompt.of(1, 2).request("early", grammar=STARS))
    core.abort("early")
    core.add_request(Prompt.of(1, 2).request("late", grammar=STARS, max_tokens=50))
    while not core.step():
        pass
    core.abort("late")
    assert not core.has_work
    assert core.runner.guidance.fill([SampleRow(sequence(name, STARS)) for name in ("early", "late")]) is None


def test_a_preempted_sequence_keeps_its_place_in_the_grammar(gqa_folder: Path) -> None:
    """Sixteen sequences over a cache for a few of them: the same answers as one at a time."""
    args = EngineArgs(
        str(gqa_folder), device="cpu", num_threads=1, max_model_len=128, kv_cache_memory_bytes=20 * 16 * 1024
    )
    core = EngineCore.build(args)
    schema = {"type": "array", "items": {"enum": ["a", 1, None]}, "minItems": 12, "maxItems": 12}
    grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})

    def add(k: int) -> None:
        core.add_request(
            Prompt.of(*range(3, 20 + k)).request(f"r{k}", grammar=grammar, max_tokens=90, temperature=1.0, seed=k)
        )

    alone: dict[str, str] = {}
    for k in range(12):
        add(k)
        alone |= {name: text for name, (text, _) in run(core).items()}
    before = core.stats.num_preemptions
    for k in range(12):
        add(k)
    together = {name: text for name, (text, _) in run(core).items()}
    assert core.stats.num_preemptions > before
    assert together == alone
    assert all(len(json.loads(text)) == 12 for text in alone.values())
