"""The choice of tokens by every way: kernels, bands on a CPU, a sort; and the tokens of earlier versions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import engine.choice
from engine.choice import MAX_SORTED, choose
from engine.noise import gumbel
from engine.row_groups import RowGroups
from engine.sample_row import SampleRow
from model.triton_kernels import noise as kernel_noise
from model.triton_kernels.language import jit, tl
from model.triton_kernels.sampling import best_tokens
from model.triton_kernels.top_p import CHUNK
from tests.engine.test_sampler import KINDS, draw, logits_of, many, sequence

V = CHUNK + 500
"""Two chunks of a kernel's work, and more than a CPU sorts."""


def shapes(vocab_size: int = V) -> dict[str, Tensor]:
    """Rows of logits of every kind, float32 [V]."""
    normal = logits_of(vocab_size=vocab_size, spread=3.0)[0]
    masked = normal.clone()
    masked[torch.arange(vocab_size) % 50 > 0] = -math.inf
    alone = torch.full((vocab_size,), -math.inf)
    alone[vocab_size - 2] = 0.0
    tail = torch.where(torch.arange(vocab_size) < 3, 2.0, -9.0)
    return {
        "spread": normal,
        "of bfloat16, with many ties": normal.bfloat16().float(),
        "in halves, with more ties": (normal * 2).round() / 2,
        "all equal": torch.full((vocab_size,), -7.25),
        "flat": normal * 0.1,
        "peaked": normal * 5,
        "behind a grammar's mask": masked,
        "one token": alone,
        "both zeros": torch.where(torch.arange(vocab_size) % 2 > 0, 0.0, -0.0),
        "a long tail that counts": tail,
    }


NUCLEI: list[dict[str, Any]] = [
    {"top_p": 0.5},
    {"top_p": 0.9, "temperature": 1.3},
    {"top_p": 1e-9},
    {"top_p": 0.9999, "temperature": 0.6},
    {"top_p": 0.8, "min_p": 0.05},
    {},
    {"min_p": 0.1, "temperature": 2.0},
    {"temperature": 0.0},
    {"top_k": 20, "top_p": 0.5, "temperature": 0.7},
    {"top_k": 3, "min_p": 0.02},
    {"top_k": 700, "top_p": 0.95},
    {"top_k": 2000},
]


def rows_of(kinds: list[dict[str, Any]], seed: int = 0) -> list[SampleRow]:
    return [
        SampleRow(sequence(seed=1000 * seed + place, output=(1,) * seed, request_id=str(place), **kind))
        for place, kind in enumerate(kinds)
    ]


def nucleus(logits: Tensor, params: dict[str, Any]) -> Tensor:
    """The tokens that may be sampled, by the definition, in float64. -> bool [V]."""
    values, ids = (logits / params.get("temperature", 1.0)).sort(descending=True, stable=True)
    values[params.get("top_k") or len(ids) :] = -math.inf
    probabilities = values.double().softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    kept = (before < params.get("top_p", 1.0)) | (torch.arange(len(ids)) == 0)
    kept &= (probabilities >= params.get("min_p", 0.0) * probabilities[0]) & (values > -math.inf)
    return torch.zeros_like(kept).index_copy_(0, ids, kept)


def oracle(logits: Tensor, row: SampleRow, params: dict[str, Any]) -> int:
    """The token of a row by definition."""
    if params.get("temperature", 1.0) == 0.0:
        return int(logits.argmax())
    values = (logits / params.get("temperature", 1.0)).masked_fill(~nucleus(logits, params), -math.inf)
    ids = torch.arange(len(logits))[None]
    return int((values + gumbel(torch.tensor([row.seed]), torch.tensor([row.num_output_tokens]), ids)[0]).argmax())


def assert_by_definition(logits: Tensor, kinds: list[dict[str, Any]], device: torch.device, seed: int = 0) -> None:
    """Sample each row with its parameters."""
    members = rows_of(kinds, seed)
    chosen, broken = choose(logits.to(device).contiguous(), RowGroups(members, device))
    rows = zip(logits, members, kinds, strict=True)
    assert chosen.tolist() == [oracle(row, member, params) for row, member, params in rows]
    assert not broken.any()


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.choice, "reaches", lambda tensor: False)


@pytest.mark.parametrize("shift", range(3))
def test_kernels_choose_the_token_of_the_definition(shift: int, kernel_device: torch.device) -> None:
    """Each kind of logits under three of the parameters."""
    kinds = [NUCLEI[(place * 3 + shift) % len(NUCLEI)] for place in range(len(shapes()))]
    assert_by_definition(torch.stack(list(shapes().values())), kinds, kernel_device)


def test_of_equals_at_the_end_of_the_nucleus_the_lower_ids_are_kept(kernel_device: torch.device) -> None:
    """So many draws that one from beyond the end would show."""
    names = ("all equal", "in halves, with more ties")
    kinds = [{"top_p": top_p} for top_p in (0.02, 0.3) for _ in range(2)]
    logits = torch.stack([shapes()[name] for name in names]).repeat_interleave(len(kinds), 0)
    assert_by_definition(logits, len(names) * kinds, kernel_device, seed=3)


@pytest.mark.parametrize("name", shapes())
def test_a_cpu_chooses_the_token_of_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_kernels(monkeypatch)
    assert V > MAX_SORTED
    for seed in range(4):
        assert_by_definition(shapes()[name].expand(len(NUCLEI), -1), NUCLEI, torch.device("cpu"), seed)


@pytest.mark.parametrize("vocab_size", [1, 64, CHUNK, CHUNK + 1])
def test_the_best_token_is_the_first_of_equals(vocab_size: int, kernel_device: torch.device) -> None:
    logits = torch.stack([logits_of(vocab_size=vocab_size, seed=seed)[0] for seed in range(4)])
    logits[1] = -math.inf
    logits[2] = logits[2].round()
    logits[3, -1] = math.nan
    token_ids, maxima, broken = best_tokens(logits.to(kernel_device))
    known = logits.nan_to_num(-math.inf, neginf=-math.inf)
    assert token_ids.tolist() == known.argmax(-1).tolist()
    assert maxima.tolist() == known.amax(-1).tolist()
    assert broken.tolist() == [False, False, False, True]


@jit
def _noise(seeds, steps, ids, out, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    stream = kernel_noise.stream_of(tl.load(seeds + row), tl.load(steps + row))
    token_ids = tl.load(ids + tl.arange(0, SIZE))
    tl.store(out + row * SIZE + tl.arange(0, SIZE), kernel_noise.gumbel(stream, token_ids))


def test_kernels_make_the_same_noise(kernel_device: torch.device) -> None:
    """The hash is the same bit for bit; the logarithm of another library may round its last bit otherwise."""
    seeds = torch.tensor([0, -1, 2**63 - 1, -(2**63), 12345])
    steps = torch.tensor([0, 7, 2**31, 1, 99])
    ids = torch.cat((torch.arange(1000), torch.arange(156_032 - 24, 156_032))).int()
    out = torch.empty(5, 1024, device=kernel_device)
    _noise[(5,)](*(x.to(kernel_device) for x in (seeds, steps, ids)), out, 1024)
    expected = gumbel(seeds, steps, ids.long()[None])
    assert (out.cpu() == expected).float().mean() > 0.999
    torch.testing.assert_close(out.cpu(), expected, atol=1e-6, rtol=1e-6)


def test_a_row_that_is_not_a_number_is_told_and_leaves_its_neighbours_alone(kernel_device: torch.device) -> None:
    kinds = [{"top_p": 0.9}, {"top_p": 0.9}, {}, {}, {"temperature": 0.0}, {"temperature": 0.0}]
    logits = shapes()["spread"].expand(len(kinds), -1).to(kernel_device).contiguous()
    healthy, _ = choose(logits, RowGroups(rows_of(kinds), kernel_device))
    logits[0], logits[2, 7], logits[4, V - 1] = math.nan, math.nan, math.nan
    chosen, broken = choose(logits, RowGroups(rows_of(kinds), kernel_device))
    assert broken.tolist() == [True, False] * 3
    assert torch.equal(chosen[1::2], healthy[1::2])
    assert ((chosen >= 0) & (chosen < V)).all(), "it is looked up in the embedding before anybody knows"


@pytest.mark.parametrize(
    ("params", "tokens"),
    [
        ({}, [2979, 393, 393, 393, 1472, 337]),
        ({"temperature": 0.6}, [393, 393, 393, 393, 393, 337]),
        ({"top_k": 9}, [1472, 393, 393, 393, 1472, 337]),
        ({"top_p": 0.8}, [1472, 393, 393, 393, 1472, 337]),
        ({"top_p": 0.95, "temperature": 1.4}, [2979, 59, 393, 393, 1472, 337]),
        ({"top_k": 2000, "top_p": 0.99, "temperature": 2.0}, [2979, 59, 906, 393, 1472, 337]),
    ],
    ids=str,
)
def test_a_seed_gives_the_tokens_that_it_always_gave(params: dict[str, Any], tokens: list[int]) -> None:
    logits = logits_of(vocab_size=3000, spread=3.0)
    assert [draw(logits, [sequence(seed=s * 977 - 3, output=(1,) * s, **params)])[0] for s in range(6)] == tokens


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_gpu_samples_what_a_cpu_samples(kind: dict[str, Any]) -> None:
    """Whose distribution the sampler's own tests hold to transformers'."""
    logits = logits_of(vocab_size=V)
    on_cpu = many(500, logits, **kind)
    assert (many(500, logits.cuda(), **kind) == on_cpu).all()
