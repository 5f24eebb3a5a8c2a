"""The sampler against transformers' logits processors, a float64 oracle, and statistics under fixed seeds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.answer import SampledToken
from engine.choice import MAX_PARTIAL
from engine.guidance import TokenMasks
from engine.messages import EngineRequest, SamplingParams, SequenceId
from engine.noise import MIX_1, MIX_2, gumbel
from engine.sample_row import SampleRow
from engine.sampler import Sampler
from engine.sequence import Sequence

V = 64
MASK = (1 << 64) - 1


def sequence(
    prompt: tuple[int, ...] = (3, 5),
    output: tuple[int, ...] = (),
    seed: int = 0,
    request_id: str = "r",
    **params: Any,
) -> Sequence:
    sampling = SamplingParams(**{"max_tokens": 1000, **params})
    made = Sequence(EngineRequest(request_id, prompt, sampling), seed)
    made.token_ids += output
    return made


def logits_of(rows: int = 1, vocab_size: int = V, seed: int = 0, spread: float = 2.0) -> Tensor:
    """Random logits, the same in each row."""
    row = torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * spread
    return row.expand(rows, -1).clone()


def draw(logits: Tensor, sequences: list[Sequence], sampler: Sampler | None = None) -> list[int]:
    """Token of each row."""
    sampler = sampler or Sampler(len(sequences), logits.shape[1], logits.device)
    sampled = sample(sampler, logits, sequences)
    return [sampled[s.sequence_id].token_id for s in sequences]


def sample(
    sampler: Sampler, logits: Tensor, sequences: list[Sequence], masks: TokenMasks | None = None
) -> dict[SequenceId, SampledToken]:
    """The one token of each sequence, without drafts."""
    sampled = sampler.sample(logits.clone(), [SampleRow(s) for s in sequences], masks).result()
    return {key: token for key, (token,) in sampled.items()}


def many(count: int, logits: Tensor, **params: Any) -> np.ndarray:
    """`count` independent samples: one row for each of so many seeds. -> counts over the vocabulary."""
    sequences = [sequence(seed=seed, request_id=str(seed), **params) for seed in range(count)]
    tokens = draw(logits.expand(count, -1), sequences)
    return np.bincount(tokens, minlength=logits.shape[-1])


def warped(logits: Tensor, params: dict[str, Any], context: tuple[int, ...] = (3, 5)) -> np.ndarray:
    """transformers' probabilities, in float64, in the order in which `generate` applies its processors."""
    processors = LogitsProcessorList()
    if (repetition := params.get("repetition_penalty", 1.0)) != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(repetition))
    if (temperature := params.get("temperature", 1.0)) != 1.0:
        processors.append(TemperatureLogitsWarper(temperature))
    if top_k := params.get("top_k", 0):
        processors.append(TopKLogitsWarper(top_k))
    if (top_p := params.get("top_p", 1.0)) < 1.0:
        processors.append(TopPLogitsWarper(top_p))
    if min_p := params.get("min_p", 0.0):
        processors.append(MinPLogitsWarper(min_p))
    scores = processors(torch.tensor([context]), logits.double().reshape(1, -1).clone())
    return scores.softmax(-1)[0].numpy()


def assert_follows(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Same support, and frequencies that a chi-square test believes."""
    assert not counts[probabilities == 0].any(), "a token outside the support was sampled"
    expected = probabilities * counts.sum()
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    if len(wanted) > 1:
        assert stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-4


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 1.7},
        {"top_k": 5},
        {"top_k": 5, "temperature": 0.5},
        {"top_k": 1000},
        {"top_p": 0.5},
        {"top_p": 0.95, "temperature": 1.5},
        {"top_p": 1e-9},
        {"min_p": 0.1},
        {"min_p": 0.02, "temperature": 2.0},
        {"min_p": 1.0},
        {"top_k": 20, "top_p": 0.5, "temperature": 0.7, "repetition_penalty": 1.1},
        {"top_k": 12, "top_p": 0.8, "min_p": 0.05},
        {"top_p": 0.9, "min_p": 0.05},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.6, "top_k": 8},
    ],
    ids=str,
)
def test_samples_follow_transformers_distribution(params: dict[str, Any]) -> None:
    logits = logits_of()
    assert_follows(many(6000, logits, **params), warped(logits, params))


@pytest.mark.parametrize(
    "params", [{"top_k": 7}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.9, "min_p": 0.1}], ids=str
)
@pytest.mark.parametrize("seed", range(5))
def test_the_whole_support_is_reached_and_nothing_else(params: dict[str, Any], seed: int) -> None:
    logits = logits_of(seed=seed, spread=0.7)
    counts = many(3000, logits, **params)
    assert set(np.flatnonzero(counts)) == set(np.flatnonzero(warped(logits, params)))


def test_a_top_k_beyond_the_partial_selection_equals_one_within() -> None:
    logits = logits_of(vocab_size=MAX_PARTIAL + 500, spread=1.0)
    for top_k in (MAX_PARTIAL, MAX_PARTIAL + 1):
        counts = many(800, logits, top_k=top_k, temperature=1.5)
        kept = set(logits[0].topk(top_k).indices.tolist())
        assert set(np.flatnonzero(counts)) <= kept


@pytest.mark.parametrize(
    "other", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"repetition_penalty": 1.3}], ids=str
)
def test_greedy_takes_the_best(other: dict[str, Any]) -> None:
    logits = logits_of()
    best = int(warped(logits, {"repetition_penalty": other.get("repetition_penalty", 1.0)}).argmax())
    assert draw(logits, [sequence(temperature=0.0, **other)]) == [best]


def test_top_k_of_one_is_greedy_at_any_temperature() -> None:
    logits = logits_of()
    assert set(np.flatnonzero(many(50, logits, top_k=1, temperature=5.0))) == {int(logits.argmax())}


def test_an_almost_zero_temperature_is_greedy() -> None:
    logits = logits_of()
    assert set(np.flatnonzero(many(50, logits, temperature=1e-6))) == {int(logits.argmax())}


def test_repetition_penalty_counts_a_token_once_and_goes_by_its_sign() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.5, 1.5, 0.0, -9.0]])
    params: dict[str, Any] = {"repetition_penalty": 2.0}
    counts = many(6000, logits, prompt=(0, 0, 1, 3), **params)
    assert_follows(counts, warped(logits, params, context=(0, 1, 3)))


def trace(logits: Tensor, steps: int, **params: Any) -> tuple[list[int], list[int]]:
    """Greedy tokens of the sampler and of an oracle that keeps its own counts."""
    made = sequence(prompt=(3, 5, 5), temperature=0.0, **params)
    sampler = Sampler(2, logits.shape[1], torch.device("cpu"))
    ours, oracle = [], []
    for _ in range(steps):
        (token,) = draw(logits, [made], sampler)
        scores = logits[0].double().clone()
        repetition = params.get("repetition_penalty", 1.0)
        for seen in {3, 5, *oracle}:
            scores[seen] = scores[seen] * repetition if scores[seen] < 0 else scores[seen] / repetition
        for seen in set(oracle):
            scores[seen] -= params.get("frequency_penalty", 0.0) * oracle.count(seen)
            scores[seen] -= params.get("presence_penalty", 0.0)
        oracle.append(int(scores.argmax()))
        ours.append(token)
        made.token_ids.append(token)
    return ours, oracle


@pytest.mark.parametrize(
    "params",
    [
        {"presence_penalty": 0.3},
        {"frequency_penalty": 0.2},
        {"frequency_penalty": -0.2},
        {"presence_penalty": 2.0, "frequency_penalty": 0.05},
        {"repetition_penalty": 1.3, "presence_penalty": 0.1, "frequency_penalty": 0.1},
        {"presence_penalty": -2.0},
    ],
    ids=str,
)
def test_penalties_follow_the_output_so_far(params: dict[str, Any]) -> None:
    ours, oracle = trace(logits_of(spread=0.5), 40, **params)
    assert ours == oracle


def test_presence_and_frequency_penalties_leave_the_prompt_alone() -> None:
    logits = logits_of()
    best = int(logits.argmax())
    made = sequence(prompt=(best,) * 9, temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0)
    assert draw(logits, [made]) == [best]


def test_a_penalty_row_is_clean_for_its_next_owner() -> None:
    logits = logits_of()
    sampler = Sampler(1, V, torch.device("cpu"))
    params = {"temperature": 0.0, "presence_penalty": 9.0, "repetition_penalty": 1.5}
    first = [draw(logits, [sequence(request_id="a", **params)], sampler) for _ in range(3)]
    sampler.penalties.release("a")
    second = [draw(logits, [sequence(request_id="b", **params)], sampler) for _ in range(3)]
    assert first == second
    assert len({token for (token,) in first}) == 3


def test_penalties_of_one_request_do_not_touch_its_neighbours() -> None:
    logits = logits_of(3)
    best = int(logits[0].argmax())
    sequences = [
        sequence(request_id="a", temperature=0.0),
        sequence(request_id="b", temperature=0.0, presence_penalty=9.0),
        sequence(request_id="c", temperature=0.0, logit_bias=((best, -50.0),)),
    ]
    sampler = Sampler(3, V, torch.device("cpu"))
    first, second = draw(logits, sequences, sampler), draw(logits, sequences, sampler)
    assert first[:2] == [best, best]
    assert second[0] == best
    assert second[1] != best
    assert best not in (first[2], second[2])


def test_logit_bias_is_added() -> None:
    logits = logits_of()
    bias = ((1, 3.0), (7, -100.0), (int(logits.argmax()), -2.0))
    shifted = logits.clone()
    for token, value in bias:
        shifted[0, token] += value
    assert_follows(many(6000, logits, logit_bias=bias), warped(shifted, {}))


@pytest.mark.parametrize("params", [{}, {"top_k": 6}, {"top_p": 0.99}, {"temperature": 0.0}], ids=str)
def test_stop_tokens_wait_for_min_tokens(params: dict[str, Any]) -> None:
    logits = logits_of()
    logits[0, [1, 2]] = 30.0
    early = sequence(output=(9, 9), min_tokens=3, stop_token_ids=(1, 2), **params)
    ready = sequence(output=(9, 9, 9), min_tokens=3, stop_token_ids=(1, 2), **params)
    for seed in range(30):
        early.seed = ready.seed = seed
        assert draw(logits, [early])[0] not in (1, 2)
        assert draw(logits, [ready])[0] in (1, 2)


KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"top_k": 9},
    {"top_k": 40, "top_p": 0.9},
    {"top_p": 0.8},
    {"min_p": 0.05},
    {"repetition_penalty": 1.2, "top_p": 0.9},
    {"frequency_penalty": 0.5},
    {"logit_bias": ((4, 2.0),)},
]


def test_a_token_depends_on_its_own_request_and_not_on_who_shares_the_batch() -> None:
    rng = np.random.default_rng(0)
    logits = torch.stack([logits_of(seed=row)[0] for row in range(len(KINDS))])
    sequences = [
        sequence(request_id=str(row), seed=100 + row, output=(row,), **kind) for row, kind in enumerate(KINDS)
    ]
    alone = [draw(logits[[row]], [sequences[row]])[0] for row in range(len(KINDS))]
    for _ in range(20):
        order = rng.permutation(len(KINDS))[: rng.integers(1, len(KINDS) + 1)]
        assert draw(logits[order], [sequences[row] for row in order]) == [alone[row] for row in order]


def test_the_noise_of_a_token_is_the_same_by_every_path() -> None:
    """Settings that keep everything give the same token, although they sort, select or do neither."""
    logits = logits_of()
    for seed in range(80):
        tokens = {
            draw(logits, [sequence(seed=seed, **params)])[0]
            for params in ({}, {"top_k": V}, {"top_p": 1.0 - 1e-7}, {"min_p": 1e-12})
        }
        assert len(tokens) == 1


def test_seeds_and_steps_differ() -> None:
    logits = torch.zeros(1, 1 << 17)
    by_seed = [draw(logits, [sequence(seed=seed)])[0] for seed in (0, 1, 2, -1, 2**63 - 1, -(2**63), 1 << 32)]
    by_step = [draw(logits, [sequence(output=(1,) * step)])[0] for step in range(7)]
    assert len(set(by_seed)) == len(by_seed)
    assert len(set(by_step)) == len(by_step)


def test_noise_is_uniform_and_independent_over_seeds_steps_and_tokens() -> None:
    size = 150
    seeds, steps = torch.arange(size), torch.zeros(size, dtype=torch.int64)
    ids = torch.arange(size)[None]
    over_ids = torch.exp(-torch.exp(-gumbel(seeds, steps, ids).double())).numpy()
    over_steps = torch.exp(-torch.exp(-gumbel(steps, seeds, ids).double())).numpy()
    for uniform in (over_ids, over_steps):
        assert stats.kstest(uniform.ravel(), "uniform").pvalue > 1e-3
        assert min(stats.kstest(row, "uniform").pvalue for row in uniform) > 1e-5
        assert min(stats.kstest(row, "uniform").pvalue for row in uniform.T) > 1e-5
        neighbours = np.corrcoef(uniform[:-1].ravel(), uniform[1:].ravel())[0, 1]
        assert abs(neighbours) < 4 / math.sqrt(size * size)
    assert abs(np.corrcoef(over_ids.ravel(), over_steps.ravel())[0, 1]) < 4 / math.sqrt(size * size)


def unmix(value: int) -> int:
    """SplitMix64's finaliser backwards."""

    def unshift(x: int, count: int) -> int:
        result = x
        for _ in range(64 // count + 1):
            result = x ^ (result >> count)
        return result

    value = unshift(value, 31) * pow(MIX_2, -1, 1 << 64) & MASK
    value = unshift(value, 27) * pow(MIX_1, -1, 1 << 64) & MASK
    return unshift(value, 30)


@pytest.mark.parametrize("bits", [0, MASK], ids=["all bits clear", "all bits set"])
def test_noise_is_finite_at_the_ends_of_the_hash(bits: int) -> None:
    token, step, golden = 17, 4, 0x9E3779B97F4A7C15
    stream = (unmix(bits) - (token + 1) * golden) & MASK
    mixed_step = _mix(step + golden & MASK)
    seed = (unmix(stream) - mixed_step) & MASK
    signed = seed - (1 << 64) if seed >> 63 else seed
    noise = gumbel(torch.tensor([signed]), torch.tensor([step]), torch.tensor([[token]]))
    assert noise.isfinite().all()
    assert (noise.item() > 30) == (bits == MASK)  # the seed was found: one end is huge, the other small


def _mix(x: int) -> int:
    x = ((x ^ x >> 30) * MIX_1) & MASK
    x = ((x ^ x >> 27) * MIX_2) & MASK
    return x ^ x >> 31


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_that_is_not_a_number_fails_alone(kind: dict[str, Any]) -> None:
    logits = torch.stack([logits_of(seed=row)[0] for row in range(3)])
    sequences = [sequence(request_id=name, **kind) for name in "abc"]
    healthy = sample(Sampler(3, V, torch.device("cpu")), logits, sequences)
    for spoiled in (slice(None), slice(5, 6)):
        broken = logits.clone()
        broken[1, spoiled] = float("nan")
        sampled = sample(Sampler(3, V, torch.device("cpu")), broken, sequences)
        assert sampled["b", 0].error
        for name in "ac":
            assert (sampled[name, 0].error, sampled[name, 0].token_id) == (None, healthy[name, 0].token_id)


def test_logprobs_are_of_the_raw_logits_best_first() -> None:
    logits = logits_of()
    params = {"temperature": 0.2, "presence_penalty": 1.0, "logit_bias": ((5, 9.0),), "top_k": 3}
    expected = logits[0].double().log_softmax(-1)
    sampler = Sampler(1, V, torch.device("cpu"))
    sampled = sample(sampler, logits, [sequence(logprobs=4, **params)])["r", 0]
    assert sampled.logprobs is not None
    assert sampled.logprobs.token_id == sampled.token_id
    assert sampled.logprobs.logprob == pytest.approx(float(expected[sampled.token_id]), abs=1e-5)
    best = expected.topk(4)
    assert [token for token, _ in sampled.logprobs.top] == best.indices.tolist()
    assert [value for _, value in sampled.logprobs.top] == pytest.approx(best.values.tolist(), abs=1e-5)


@pytest.mark.parametrize(("asked", "given"), [(None, None), (0, 0), (20, 20)])
def test_as_many_logprobs_as_asked(asked: int | None, given: int | None) -> None:
    sampled = sample(Sampler(1, V, torch.device("cpu")), logits_of(), [sequence(logprobs=asked)])["r", 0]
    assert (None if sampled.logprobs is None else len(sampled.logprobs.top)) == given


def masks_of(rows: tuple[int, ...], allowed: set[int], forced: tuple[tuple[int, int], ...] = ()) -> TokenMasks:
    bits = np.zeros((len(rows), V), dtype=np.uint8)
    bits[:, sorted(allowed)] = 1
    return TokenMasks(rows, np.packbits(bits, axis=1, bitorder="little"), forced)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 2.0},
        {"temperature": 2.0, "top_k": 3},
        {"temperature": 2.0, "top_p": 0.5},
        {"temperature": 2.0, "min_p": 0.3},
        {"temperature": 1.0, "logit_bias": ((1, 100.0),)},
        {"temperature": 1.0, "repetition_penalty": 3.0, "presence_penalty": 2.0},
    ],
)
def test_a_mask_holds_whatever_the_parameters_say(params: dict[str, Any]) -> None:
    sequences = [sequence(seed=seed, request_id=str(seed), logprobs=1, **params) for seed in range(40)]
    logits = logits_of(40)
    free = sample(Sampler(40, V, torch.device("cpu")), logits, sequences)
    masks = masks_of(tuple(range(0, 40, 2)), {7, 40, 63})
    sampled = sample(Sampler(40, V, torch.device("cpu")), logits, sequences, masks)
    assert {sampled[str(row), 0].token_id for row in masks.rows} <= {7, 40, 63}
    assert all(sampled[str(row), 0] == free[str(row), 0] for row in range(1, 40, 2))
    best = int(logits[0].argmax())
    assert all(token.logprobs and token.logprobs.top[0][0] == best for token in sampled.values())


def test_a_forced_token_is_sampled_where_nothing_else_is_left() -> None:
    sequences = [
        sequence(seed=seed, request_id=str(seed), min_tokens=9, stop_token_ids=(12,), temperature=1.0, top_p=0.9)
        for seed in range(8)
    ]
    masks = masks_of((2, 5), {12}, forced=((2, 12), (5, 12)))
    sampled = sample(Sampler(8, V, torch.device("cpu")), logits_of(8), sequences, masks)
    assert [row for row in range(8) if sampled[str(row), 0].token_id == 12] == [2, 5]
