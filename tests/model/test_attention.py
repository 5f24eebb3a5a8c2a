"""Each backend against dense attention in float64, over every shape of a step that the engine makes."""

from __future__ import annotations

import pytest
import torch

from model.attention import EncoderMetadata
from model.attention.cpu import MAX_QUERIES, MAX_SCORES, CpuBackend
from model.attention.reference import ReferenceBackend, rotate, write_kv
from model.attention.rotate_cpu import rotate_and_write
from model.layers import RotaryEmbedding
from tests.model.attention_cases import (
    CASES,
    HEADS,
    LONG_CASES,
    PADDED_CASES,
    POOL,
    Case,
    D,
    P,
    decode,
    dense,
    expected,
    make_step,
)

BACKENDS = [ReferenceBackend, CpuBackend]
Backend = type[ReferenceBackend]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("in_place", [False, True], ids=["scattered", "in place"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("stale", [0.0, 1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_equals_dense_attention_whatever_lies_in_unused_slots(
    case: Case, heads: tuple[int, int], stale: float, in_place: bool, backend: Backend
) -> None:
    query, key, value, cache, everything, metadata = make_step(case, heads, stale, in_place)
    out = decode(backend(), query, key, value, cache, metadata)
    torch.testing.assert_close(out.double(), expected(query, everything, metadata), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_writes_its_keys_and_values_and_nothing_else(case: Case, backend: Backend) -> None:
    query, key, value, cache, _everything, metadata = make_step(case, (4, 2), 7.0)
    judged = cache.clone()
    slots = judged.view(2, POOL * P, 2, D)
    slots[0, metadata.slot_mapping], slots[1, metadata.slot_mapping] = key, value
    decode(backend(), query, key, value, cache, metadata)
    assert torch.equal(cache, judged)


@pytest.mark.parametrize("kind", BACKENDS, ids=lambda backend: backend.name)
def test_scratch_memory_kept_between_steps_changes_no_result(kind: Backend) -> None:
    backend = kind()
    for case in (*CASES, *reversed(CASES)):
        for heads in HEADS:
            step = make_step(case, heads, float("nan"))
            fresh = make_step(case, heads, float("nan"))
            ours = decode(backend, *step[:4], step[5])
            assert torch.equal(ours, decode(kind(), *fresh[:4], fresh[5]))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_long_sequences(case: Case, heads: tuple[int, int], backend: Backend) -> None:
    query, key, value, cache, everything, metadata = make_step(case, heads, float("nan"))
    out = decode(backend(), query, key, value, cache, metadata)
    torch.testing.assert_close(out.double(), expected(query, everything, metadata), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("case", PADDED_CASES, ids=str)
def test_padding_rows_write_nothing_and_give_zeros(case: Case, heads: tuple[int, int]) -> None:
    """To the oracle; a CPU's own backend is never given any."""
    query, key, value, cache, everything, metadata = make_step(case, heads, 7.0)
    judged = cache.clone()
    written = metadata.slot_mapping >= 0
    slots = metadata.slot_mapping[written]
    judged.flatten(1, 2)[0, slots], judged.flatten(1, 2)[1, slots] = key[written], value[written]
    out = decode(ReferenceBackend(), query, key, value, cache, metadata)
    torch.testing.assert_close(out.double(), expected(query, everything, metadata), atol=2e-6, rtol=1e-5)
    assert torch.equal(cache, judged)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_bfloat16_stays_near_the_oracle(backend: Backend) -> None:
    query, key, value, cache, everything, metadata = make_step(CASES[-1], (4, 2), 0.0)
    step = (x.bfloat16() for x in (query, key, value))
    cache = cache.to(backend().kv_cache_dtype(torch.bfloat16, torch.device("cpu")))
    out = decode(backend(), *step, cache, metadata)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected(query, everything, metadata), atol=0.05, rtol=0.05)


def test_the_reference_takes_a_bfloat16_cache() -> None:
    query, key, value, cache, everything, metadata = make_step(CASES[-1], (4, 2), 0.0)
    out = decode(ReferenceBackend(), *(x.bfloat16() for x in (query, key, value, cache)), metadata)
    torch.testing.assert_close(out.double(), expected(query, everything, metadata), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("num_tokens", "heads", "head_dim"), [(1, (4, 4), 64), (9, (6, 2), 16), (40, (3, 1), 10)])
def test_the_compiled_rotation_rounds_as_the_reference_does(
    num_tokens: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> None:
    num_heads, num_kv_heads = heads
    x = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim).to(dtype)
    cos, sin = RotaryEmbedding(head_dim, 1e4).tables(torch.arange(5, 5 + num_tokens, dtype=torch.int32), dtype)
    ours, theirs = torch.full((2, 2, 4, P, num_kv_heads, head_dim), 7.0, dtype=dtype)
    slots = torch.randperm(4 * P)[:num_tokens].int()
    turned = rotate_and_write(x, cos, sin, ours, slots)
    query, key, value = rotate(x, cos, sin, num_kv_heads)
    write_kv(key, value, theirs, slots)
    tolerance = 0 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(turned, torch.cat((query, key), dim=1), atol=tolerance, rtol=0)
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_threads_and_head_groups_change_no_result(num_threads: int) -> None:
    """One sequence is shared out by heads when there are more threads than sequences."""
    step = make_step(Case("one", ((1, 100),)), (8, 4), float("nan"))
    judged = dense(step[0], *step[4][0])
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        out = decode(CpuBackend(), *step[:4], step[5])
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(out.double(), judged, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("length", [MAX_QUERIES, MAX_QUERIES + 1])
def test_the_kernel_and_torch_agree_where_one_hands_over_to_the_other(length: int) -> None:
    step = make_step(Case("edge", ((1, 9), (length, 90), (40, 40))), (4, 2), float("nan"))
    out = decode(CpuBackend(), *step[:4], step[5])
    torch.testing.assert_close(out.double(), expected(step[0], *step[4:]), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_broken_sequence_is_not_a_number_and_its_neighbours_are(poison: float) -> None:
    """What is not a number must stay so: the sampler ends that request, and would believe any finite nonsense."""
    query, key, value, cache, everything, metadata = make_step(Case("two", ((1, 20), (1, 20))), (4, 4), 0.0)
    cache[0, metadata.block_table[0, 0], 3] = poison
    out = decode(CpuBackend(), query, key, value, cache, metadata)
    assert not out[0].isfinite().any()
    torch.testing.assert_close(out[1:].double(), dense(query[1:], *everything[1]), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("spread", [1.0, 30.0, 1e4])
def test_the_softmax_holds_for_scores_of_any_size(spread: float) -> None:
    query, key, value, cache, everything, metadata = make_step(CASES[4], (4, 4), 0.0)
    out = decode(CpuBackend(), query * spread, key, value, cache, metadata)
    judged = expected(query * spread, everything, metadata)
    torch.testing.assert_close(out.double(), judged, atol=1e-5 * spread**0.5, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_encoder_attention_stays_within_each_clip(backend: Backend) -> None:
    lens = (1, 37, 2, 16)
    query, key, value = torch.randn(3, sum(lens), 4, D, generator=torch.Generator().manual_seed(0))
    out = backend().encode(query, key, value, EncoderMetadata(lens))
    parts = zip(*(x.split(list(lens)) for x in (query, key, value)), strict=True)
    judged = torch.cat([dense(q, k, v, causal=False) for q, k, v in parts])
    torch.testing.assert_close(out.double(), judged, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("num_frames", [1, 100, 1500])
def test_clips_in_bfloat16_are_nearly_as_near_to_the_oracle_as_torch_brings_them(num_frames: int) -> None:
    assert 4 * 100**2 < MAX_SCORES < 4 * 1500**2, "all heads at once, and head by head"
    lens = (num_frames, 3)
    query, key, value = torch.randn(3, sum(lens), 4, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    parts = zip(*(x.split(list(lens)) for x in (query, key, value)), strict=True)
    judged = torch.cat([dense(q, k, v, causal=False) for q, k, v in parts])
    errors = [
        (backend().encode(query, key, value, EncoderMetadata(lens)).double() - judged).norm() for backend in BACKENDS
    ]
    assert errors[1] < 3 * errors[0]
