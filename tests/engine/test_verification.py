"""Drafts in the sampler: the tokens that one row at a time would give, seed for seed, and the true distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from engine.answer import SampledToken
from engine.messages import EngineRequest, SamplingParams
from engine.sample_row import SampleRow
from engine.sampler import Sampler
from engine.sequence import Sequence
from engine.verification import verify

V = 24
PROMPT = (3, 5)
CPU = torch.device("cpu")


def sequence(seed: int = 0, name: str = "r", **params: Any) -> Sequence:
    return Sequence(EngineRequest(name, PROMPT, SamplingParams(**{"max_tokens": 1000, **params})), seed)


def rows_of(made: Sequence, drafts: tuple[int, ...]) -> list[SampleRow]:
    return [SampleRow(made, drafts[:count]) for count in range(1 + len(drafts))]


def table(order: int = 1, seed: int = 0) -> Tensor:
    """A language whose next logits depend on the last `order` tokens."""
    return torch.randn(*[V] * order, V, generator=torch.Generator().manual_seed(seed)) * 1.5


def next_logits(language: Tensor, row: SampleRow) -> Tensor:
    return language[[*row.sequence.token_ids, *row.draft_token_ids][-1]].clone()


def answer(language: Tensor, made: Sequence, length: int, drafter: Any = None) -> tuple[list[SampledToken], int]:
    """Sample an answer with drafts or without. -> tokens, and how many steps it took."""
    sampler = Sampler(1, V, CPU)
    tokens: list[SampledToken] = []
    num_steps = 0
    while len(tokens) < length:
        rows = rows_of(made, drafter(made) if drafter else ())
        logits = torch.stack([next_logits(language, row) for row in rows])
        new = sampler.sample(logits, rows).result()[made.sequence_id]
        tokens += new
        made.token_ids += [token.token_id for token in new]
        num_steps += 1
    return tokens[:length], num_steps


KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.6, "top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"top_k": 12, "top_p": 0.9, "logprobs": 3},
    {"logit_bias": ((4, 2.0),), "min_tokens": 20, "stop_token_ids": (1, 2)},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"temperature": 0.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_same_seed_gives_the_same_answer_with_drafts(kind: dict[str, Any]) -> None:
    """Half of the drafts are what the language likes best, half are anything: both are accepted now and then."""
    language = table()
    generator = np.random.default_rng(1)

    def drafter(made: Sequence) -> tuple[int, ...]:
        drafts = []
        last = made.token_ids[-1]
        for _ in range(generator.integers(0, 5)):
            likely = int(language[last].argmax())
            drafts.append(last := likely if generator.random() < 0.5 else int(generator.integers(V)))
        return tuple(drafts)

    saved = 0
    for seed in range(25):
        plain, _ = answer(language, sequence(seed, **kind), 30)
        drafted, num_steps = answer(language, sequence(seed, **kind), 30, drafter)
        assert [token.token_id for token in drafted] == [token.token_id for token in plain]
        for token, expected in zip(drafted, plain, strict=True):
            assert (token.logprobs is None) == (expected.logprobs is None)
            if token.logprobs and expected.logprobs:
                assert token.logprobs.logprob == pytest.approx(expected.logprobs.logprob, abs=1e-6)
                assert [top for top, _ in token.logprobs.top] == [top for top, _ in expected.logprobs.top]
        saved += 30 - num_steps
    assert saved > 25


@pytest.mark.parametrize("params", [{}, {"temperature": 0.7, "top_k": 6}, {"top_p": 0.8}], ids=str)
def test_what_comes_out_of_drafts_follows_the_true_distribution(params: dict[str, Any]) -> None:
    """Three tokens of 6,000 answers, drafts always offered, each against its distribution given the last."""
    language = table(seed=3)
    count = 6000
    made = [sequence(seed, str(seed), **params) for seed in range(count)]
    likely = int(language[PROMPT[-1]].argmax())
    drafts = (likely, int(language[likely].argmax()))
    rows = [row for one in made for row in rows_of(one, drafts)]
    sampled = Sampler(1, V, CPU).sample(torch.stack([next_logits(language, row) for row in rows]), rows).result()
    answers = [[token.token_id for token in sampled[one.sequence_id]] for one in made]
    assert {len(tokens) for tokens in answers} == {1, 2, 3}
    for place, last in enumerate((PROMPT[-1], *drafts)):
        tokens = [given[place] for given in answers if len(given) > place]
        counts = np.bincount(tokens, minlength=V)
        expected = probabilities(language[last], params) * len(tokens)
        assert not counts[expected == 0].any()
        common = expected >= 5
        observed, wanted = (
            np.append(counts[common], counts[~common].sum()),
            np.append(expected[common], expected[~common].sum()),
        )
        kept = wanted > 0
        assert stats.chisquare(observed[kept], wanted[kept]).pvalue > 1e-3


def probabilities(logits: Tensor, params: dict[str, Any]) -> np.ndarray:
    """The definition, in float64."""
    values = (logits.double() / params.get("temperature", 1.0)).numpy()
    order = np.argsort(-values)
    chances = np.exp(values - values.max())
    if top_k := params.get("top_k"):
        chances[order[top_k:]] = 0
    chances /= chances.sum()
    before = np.cumsum(chances[order]) - chances[order]
    chances[order[before >= params.get("top_p", 1.0)]] = 0
    result: np.ndarray = chances / chances.sum()
    return result


@given(
    batch=st.lists(
        st.integers(0, 4).flatmap(
            lambda n: st.tuples(*[st.lists(st.integers(0, 2), min_size=k, max_size=k) for k in (n, n + 1)])
        ),
        min_size=1,
        max_size=5,
    )
)
def test_rows_stand_up_to_the_first_wrong_draft(batch: list[tuple[list[int], list[int]]]) -> None:
    rows, token_ids, expected = [], [], []
    for index, (drafts, sampled) in enumerate(batch):
        rows += rows_of(sequence(name=str(index)), tuple(drafts))
        token_ids += sampled
        num_right = next((k for k, draft in enumerate(drafts) if draft != sampled[k]), len(drafts))
        expected += [k <= num_right for k in range(len(sampled))]
    assert verify(torch.tensor(token_ids), rows).tolist() == expected


def test_logits_that_are_no_numbers_fail_the_answer_only_where_it_goes() -> None:
    logits = torch.zeros(3, V)
    logits[:, 7] = 5.0
    logits[2] = float("nan")
    for drafts, failed in (((7, 7), True), ((7, 6), False)):
        made = sequence(temperature=0.0)
        tokens = Sampler(1, V, CPU).sample(logits.clone(), rows_of(made, drafts)).result()[made.sequence_id]
        assert [token.token_id for token in tokens[:2]] == [7, 7]
        assert any(token.error for token in tokens) == failed


def test_penalties_count_a_draft_only_once_it_stands() -> None:
    made = sequence(temperature=0.0, frequency_penalty=1.0)
    sampler = Sampler(1, V, CPU)
    logits = torch.zeros(1, V)
    logits[0, [4, 6]] = torch.tensor([5.0, 4.5])
    first = sampler.sample(logits.expand(3, -1).clone(), rows_of(made, (4, 9))).result()[made.sequence_id]
    assert [token.token_id for token in first] == [4, 6]  # 9 was wrong: it leaves no trace
    made.token_ids += [4, 6]
    counts = sampler.penalties.output_counts(sampler.penalties.rows([made]), [()])[0]
    assert counts.nonzero()[:, 0].tolist() == [4, 6]
