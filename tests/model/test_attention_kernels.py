"""The attention backends of a GPU against dense attention in float64: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention import AttentionBackend, AttentionMetadata, EncoderMetadata
from model.attention.reference import ReferenceBackend
from model.attention.triton import TritonBackend
from model.config import Qwen2AudioConfig
from model.kv_cache import allocate_kv_cache
from model.layers import RotaryEmbedding
from model.loader import load_model
from model.triton_kernels import encoder_attention, paged_decode, paged_prefill
from tests.model.attention_cases import (
    CASES,
    HEADS,
    LONG_CASES,
    PADDED_CASES,
    Case,
    decode,
    dense,
    expected,
    make_step,
)

BACKENDS = [
    pytest.param(TritonBackend, "cpu", marks=pytest.mark.interpreter, id="triton-interpreted"),
    pytest.param(TritonBackend, "cuda", marks=pytest.mark.gpu, id="triton-cuda"),
    pytest.param(ReferenceBackend, "cuda", marks=pytest.mark.gpu, id="reference-cuda"),
]
NAN = float("nan")
MAP_NORESERVE = 0x4000
"""Linux's, which Python 3.11 does not name: else it refuses more than a machine has."""


FEW_HEADS = [(2, 2), (4, 2), (3, 1)]
"""For the interpreter, which takes as long again for each."""


def precisions(device: torch.device | str) -> list[torch.dtype]:
    """The interpreter multiplies bfloat16 wrongly, without a word."""
    return [torch.float32, torch.float16, *([torch.bfloat16] if torch.device(device).type == "cuda" else [])]


def head_dims(device: torch.device | str) -> list[int]:
    return [16] if torch.device(device).type == "cpu" else [16, 64, 128]


@pytest.fixture(autouse=True)
def few_programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes ten milliseconds for each program, as long for a few tiles of keys: one to eight shares,
    by the size of the batch; and float32, whose tiles are small for a GPU's sake, has those of other precisions."""
    if request.node.get_closest_marker("interpreter"):
        monkeypatch.setattr(paged_decode, "TARGET_PROGRAMS", 8)
        for module in (paged_decode, paged_prefill, encoder_attention):
            monkeypatch.setattr(module, "TILINGS", {**module.TILINGS, 4: module.TILINGS[2]})


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors are full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_near(out: Tensor, judged: Tensor) -> None:
    """Relative to the largest of each row: a value near 0 is a sum of larger ones."""
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[out.dtype]
    scale = judged.abs().amax(-1, keepdim=True).clamp_min(1e-3)
    error = ((out.double() - judged) / scale).abs().amax()
    assert error < bound, f"off by {error:.1e}"


def check(backend: AttentionBackend, case: Case, heads: tuple[int, int], device: str, stale: float = NAN) -> None:
    dtypes = precisions(device)
    twice = case.name.startswith("decodes ") and heads == FEW_HEADS[1]
    if not (twice if device == "cpu" else isinstance(backend, TritonBackend)):
        dtypes.remove(torch.float32)  # a few cases are enough for the interpreter; torch may use TF32
    for dtype in dtypes:
        for head_dim in head_dims(device):
            step = make_step(case, heads, stale, head_dim=head_dim, dtype=dtype, device=device)
            query, key, value, cache, everything, metadata = step
            with poisoned_memory() if isinstance(backend, TritonBackend) else nullcontext():
                out = decode(backend, query, key, value, cache, metadata)
            assert out.dtype == dtype
            assert_near(out, expected(query, everything, metadata))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("heads", [0, 1, 2], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_equals_dense_attention(case: Case, heads: int, backend: type[AttentionBackend], device: str) -> None:
    check(backend(), case, (FEW_HEADS if device == "cpu" else HEADS)[heads], device)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("stale", [1e30, float("inf")])
def test_what_lies_in_unused_slots_is_never_used(stale: float, backend: type[AttentionBackend], device: str) -> None:
    check(backend(), CASES[-1], (2, 1), device, stale)


@pytest.mark.parametrize("case", PADDED_CASES, ids=str)
def test_padding_rows_write_nothing_and_give_zeros(case: Case, kernel_device: torch.device) -> None:
    for heads in FEW_HEADS:
        check(TritonBackend(), case, heads, kernel_device.type)
    query, key, value, cache, _everything, metadata = make_step(case, (4, 2), 7.0, head_dim=16, device=kernel_device)
    is_padding = metadata.seq_lens_device == 0
    before = cache.clone()
    slots = before.flatten(1, 2)
    slots[:, metadata.slot_mapping[~is_padding]] = torch.stack((key, value))[:, ~is_padding]
    out = decode(TritonBackend(), query, key, value, cache, metadata)
    assert torch.equal(cache, before)
    assert not out[is_padding].any()


@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 65, 200])
def test_there_may_be_more_shares_than_tiles_of_keys(
    length: int, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = make_step(
        Case("one", ((1, length),)), (2, 1), NAN, head_dim=16, dtype=torch.float16, device=kernel_device
    )
    query, key, value, cache, everything, metadata = step
    for shares in (1, 2, 16):
        monkeypatch.setattr(paged_decode, "TARGET_PROGRAMS", shares)
        with poisoned_memory():
            out = decode(TritonBackend(), query, key, value, cache, metadata)
        assert_near(out, expected(query, everything, metadata))


def test_a_batch_padded_to_the_size_of_a_graph_is_cut_as_it_would_be_unpadded() -> None:
    for sizes in ((1,), (2,), (3, 4), (5, 8), (9, 16), (17, 24), (25, 32), (33, 40), (65, 72)):
        for num_kv_heads in (1, 4, 8, 32):
            assert len({paged_decode.num_shares(size, num_kv_heads) for size in sizes}) == 1


def test_a_large_batch_is_not_cut_and_a_single_sequence_fills_the_device() -> None:
    assert paged_decode.num_shares(64, 32) == 1
    assert paged_decode.num_shares(1, 32) == 16
    assert paged_decode.num_shares(8, 32) * 8 * 32 == paged_decode.TARGET_PROGRAMS


@pytest.mark.parametrize(("num_queries", "shares"), [(1, 1), (1, 4), (5, 4), (20, 1)])
@pytest.mark.parametrize("poison", [NAN, float("inf")])
def test_a_broken_sequence_is_not_a_number_and_its_neighbours_are(
    poison: float, num_queries: int, shares: int, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_decode, "TARGET_PROGRAMS", 4 * shares)
    case = Case("three", ((num_queries, 90), (num_queries, 90), (num_queries, 90)))
    step = make_step(case, (1, 1), NAN, head_dim=16, dtype=torch.float16, device=kernel_device)
    query, key, value, cache, everything, metadata = step
    assert paged_decode.num_shares(3, 1) == shares
    cache[0, metadata.block_table[1, 0], 3] = poison
    out = decode(TritonBackend(), query, key, value, cache, metadata).split(num_queries)
    judged = expected(query, everything, metadata).split(num_queries)
    assert out[1].isnan().all()
    assert_near(out[0], judged[0])
    assert_near(out[2], judged[2])


@pytest.mark.parametrize("spread", [30.0, 1e3])
def test_the_softmax_holds_for_scores_of_any_size(spread: float, kernel_device: torch.device) -> None:
    step = make_step(CASES[-1], (2, 2), NAN, head_dim=16, device=kernel_device)
    query, key, value, cache, everything, metadata = step
    out = decode(TritonBackend(), query * spread, key, value, cache, metadata)
    judged = expected(query * spread, everything, metadata)
    torch.testing.assert_close(out.double(), judged, atol=1e-4 * spread**0.5, rtol=1e-3)


def test_queries_and_keys_are_turned_by_their_positions(kernel_device: torch.device) -> None:
    query, key, value, cache, _everything, metadata = make_step(CASES[-1], (4, 2), 0.0, head_dim=16)
    positions = torch.cat(
        [torch.arange(total - num, total) for num, total in zip(metadata.query_lens, metadata.seq_lens, strict=True)]
    )
    tables = RotaryEmbedding(16, 1e4).tables(positions, torch.float32)
    heads = torch.cat((query, key, value), dim=1)
    judged = ReferenceBackend().decode(heads, *tables, cache.clone(), metadata)
    names = ("block_table", "slot_mapping", "seq_lens_device", "query_starts")
    there = replace(metadata, **{name: getattr(metadata, name).to(kernel_device) for name in names})
    ours = TritonBackend().decode(*(x.to(kernel_device) for x in (heads, *tables, cache)), there)
    torch.testing.assert_close(ours.cpu(), judged, atol=1e-5, rtol=1e-5)


def step_of(rows: list[tuple[int, int, tuple[int, ...]]], device: torch.device) -> tuple[Tensor, AttentionMetadata]:
    """(query tokens, keys in all, blocks) of each sequence -> positions [T], and the metadata."""
    width = max(len(table) for *_, table in rows)
    places = [(table, place) for num, length, table in rows for place in range(length - num, length)]

    def integers(values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    metadata = AttentionMetadata(
        query_lens=tuple(num for num, *_ in rows),
        seq_lens=tuple(length for _, length, _ in rows),
        num_decodes=sum(num == 1 for num, *_ in rows),
        first_blocks=(None,) * len(rows),
        block_table=integers([[*table, *[0] * (width - len(table))] for *_, table in rows]),
        slot_mapping=integers([table[place // 16] * 16 + place % 16 for table, place in places]),
        seq_lens_device=integers([length for _, length, _ in rows]),
        query_starts=integers([0, *accumulate(num for num, *_ in rows)]),
    )
    return integers([place for _, place in places]), metadata


def test_a_whole_model_computes_what_it_does_with_plain_torch(gqa_folder: Path, kernel_device: torch.device) -> None:
    """Two clips, a prompt with one of them, then decodes beside another prompt in two chunks."""
    config = Qwen2AudioConfig.from_folder(gqa_folder)
    clips = [torch.sin(torch.arange(size) / 5).numpy() for size in (6000, 3000)]
    results = []
    for backend in (ReferenceBackend(), TritonBackend()):
        model = load_model(gqa_folder, config, backend, torch.float32, kernel_device)
        cache = allocate_kv_cache(config.text, 6, 16, torch.float32, kernel_device)
        with torch.inference_mode():
            audio = model.encode_audio(clips)
            hidden = [*audio]
            for step in (
                [(len(audio[0]), len(audio[0]), (4, 2))],
                [(1, len(audio[0]) + 1, (4, 2)), (20, 20, (1, 5))],
                [(1, len(audio[0]) + 2, (4, 2)), (9, 29, (1, 5))],
            ):
                positions, metadata = step_of(step, kernel_device)
                rows = audio[0] if len(step) == 1 else model.embed(positions)
                hidden.append(model(rows, positions, cache, metadata))
        results.append(hidden)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_prompts_of_more_sequences_than_are_scanned_at_once(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_prefill, "SCAN", 4)
    case = Case("many", ((1, 20), (130, 130), *((17 + index % 3, 30 + index) for index in range(5))))
    step = make_step(case, (1, 1), NAN, head_dim=16, dtype=torch.float16, device=kernel_device)
    query, key, value, cache, everything, metadata = step
    assert_near(decode(TritonBackend(), query, key, value, cache, metadata), expected(query, everything, metadata))


@pytest.mark.parametrize("heads", [(1, 1), (2, 1)], ids=str)
def test_the_longest_context(
    heads: tuple[int, int], kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decode, and a chunk whose last tile of queries is not full; in the interpreter by larger tiles of keys."""
    if kernel_device.type == "cpu":
        for module in (paged_decode, paged_prefill):
            monkeypatch.setattr(module, "TILINGS", {2: replace(module.TILINGS[2], keys=512)})
    case = Case("long", ((1, 8192), (1, 17), (140, 8192)))
    step = make_step(case, heads, NAN, head_dim=16, dtype=torch.float16, device=kernel_device)
    query, key, value, cache, everything, metadata = step
    assert_near(decode(TritonBackend(), query, key, value, cache, metadata), expected(query, everything, metadata))


@pytest.mark.parametrize("case", [CASES[4], CASES[-1], PADDED_CASES[1]], ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
def test_a_cache_in_float8_is_what_is_stored_times_its_scales(
    case: Case, heads: tuple[int, int], kernel_device: torch.device
) -> None:
    for dtype in precisions(kernel_device)[heads[0] // 4 :]:
        step = make_step(case, heads, 0.0, head_dim=16, dtype=dtype, device=kernel_device)
        query, key, value, cache, everything, metadata = step
        scales = torch.linspace(0.01, 0.05, 2 * heads[1], device=kernel_device).view(2, heads[1])
        cache = (cache.float() / scales[:, None, None, :, None]).to(torch.float8_e4m3fn)
        half = query.new_ones(query.shape[0], 1, 8)
        all_heads = torch.cat((query, key, value), dim=1)
        with poisoned_memory():
            out = TritonBackend().decode(all_heads, half, torch.zeros_like(half), cache, metadata, scales)
        read = (cache.float() * scales[:, None, None, :, None]).flatten(1, 2)
        kept = []
        for row, length in enumerate(metadata.seq_lens):
            places = torch.arange(length, device=kernel_device)
            kept.append(read[:, metadata.block_table[row, places // 16] * 16 + places % 16])
            past = slice(0, max(0, length - metadata.query_lens[row]))  # how a step is stored is tested elsewhere
            torch.testing.assert_close(kept[-1][:, past], everything[row][:, past].float(), atol=0.02, rtol=0.07)
        assert_near(out, expected(query, kept, metadata))


@pytest.mark.gpu
def test_not_a_number_in_float8_stays_so() -> None:
    """The interpreter takes it for 480."""
    case = Case("two", ((1, 20), (1, 20)))
    step = make_step(case, (2, 2), 0.0, head_dim=16, dtype=torch.bfloat16, device="cuda")
    query, key, value, cache, _everything, metadata = step
    scales = torch.ones(2, 2, device="cuda")
    half = query.new_ones(2, 1, 8)
    cache[0, metadata.block_table[0, 0], 3, 0, 5] = NAN
    cache = cache.to(torch.float8_e4m3fn)
    heads = torch.cat((query, key, value), dim=1)
    out = TritonBackend().decode(heads, half, torch.zeros_like(half), cache, metadata, scales)
    assert out[0, 0].isnan().all()
    assert out[0, 1].isfinite().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("lens", [(1, 37, 2, 16), (130, 0, 64, 5), (3, 1, 2, 3, 20, 0, 1, 4, 17)], ids=str)
def test_encoder_attention_stays_within_each_clip(
    lens: tuple[int, ...], kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_attention, "SCAN", 4)
    num_heads, surplus = 2, 3
    for dtype in precisions(kernel_device):
        for head_dim in head_dims(kernel_device):
            generator = torch.Generator().manual_seed(0)
            packed = torch.randn(sum(lens) + surplus, 3 * num_heads * head_dim, generator=generator)
            packed[sum(lens) :] = NAN  # what a run padded to the size of a graph may hold
            query, key, value = (
                x.unflatten(-1, (-1, head_dim)) for x in packed.to(kernel_device, dtype).chunk(3, dim=-1)
            )
            starts = torch.tensor([0, *lens]).cumsum(0, dtype=torch.int32).to(kernel_device)
            with poisoned_memory():
                out = TritonBackend().encode(query, key, value, EncoderMetadata(lens, starts))[: sum(lens)]
            parts = zip(*(x[: sum(lens)].split(list(lens)) for x in (query, key, value)), strict=True)
            assert_near(out, torch.cat([dense(q, k, v, causal=False) for q, k, v in parts]))


def test_a_broken_clip_leaves_its_neighbours_alone(kernel_device: torch.device) -> None:
    lens = (20, 30, 25)
    query, key, value = torch.randn(3, 75, 2, 16, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    key[21] = NAN
    starts = torch.tensor([0, 20, 50, 75], dtype=torch.int32, device=kernel_device)
    out = TritonBackend().encode(query, key, value, EncoderMetadata(lens, starts))
    first, second, third = out.split(lens)
    assert second.isnan().all()
    assert first.isfinite().all()
    assert third.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "device"), BACKENDS[1:])
@pytest.mark.parametrize("heads", [(32, 32), (8, 2)], ids=str)
@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_long_sequences(case: Case, heads: tuple[int, int], backend: type[AttentionBackend], device: str) -> None:
    step = make_step(case, heads, NAN, head_dim=128, dtype=torch.bfloat16, device=device)
    query, key, value, cache, everything, metadata = step
    out = decode(backend(), query, key, value, cache, metadata)
    assert_near(out, expected(query, everything, metadata))


def test_a_cache_of_more_than_two_to_the_31_numbers(kernel_device: torch.device) -> None:
    """What lies past them is reached, keys and values; on a CPU the rest is memory that nobody touches."""
    on_gpu = kernel_device.type == "cuda"
    heads, head_dim, dtype = ((32, 32), 128, torch.bfloat16) if on_gpu else ((1, 1), 16, torch.float16)
    query, key, value, cache, everything, metadata = make_step(
        Case("far", ((1, 40), (30, 50))), heads, NAN, head_dim=head_dim, dtype=dtype, device=kernel_device
    )
    behind = 2**31 // cache[0, 0].numel() + 1  # blocks
    shape = (2, behind + cache.shape[1], *cache.shape[2:])
    large = torch.empty(shape, dtype=dtype, device=kernel_device) if on_gpu else untouched(shape, dtype)
    large[:, behind:] = cache
    there = replace(
        metadata,
        block_table=metadata.block_table + behind,
        slot_mapping=metadata.slot_mapping + behind * cache.shape[2],
    )
    assert_near(decode(TritonBackend(), query, key, value, large, there), expected(query, everything, metadata))


def untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=flags), dtype=dtype).view(shape)


@pytest.mark.gpu
def test_a_captured_step_reads_lengths_and_tables_when_it_is_replayed() -> None:
    first = make_step(Case("captured", ((1, 1),) * 4), (8, 8), NAN, head_dim=64, dtype=torch.bfloat16, device="cuda")
    later = make_step(
        Case("replayed", ((1, 100), (1, 17), (1, 300), (1, 0))), (8, 8), NAN, head_dim=64, dtype=torch.bfloat16,
        device="cuda",
    )  # fmt: skip
    width = later[5].block_table.shape[1]
    static = replace(
        first[5],
        seq_lens=(300,) * 4,
        block_table=torch.zeros(4, width, dtype=torch.int32, device="cuda"),
        slot_mapping=torch.full((4,), -1, dtype=torch.int32, device="cuda"),
        seq_lens_device=torch.zeros(4, dtype=torch.int32, device="cuda"),
    )
    query, key, value, cache = (x.clone() for x in later[:4])
    backend = TritonBackend()
    decode(backend, query, key, value, cache, static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode(backend, query, key, value, cache, static)
    for name in ("block_table", "slot_mapping", "seq_lens_device"):
        getattr(static, name).copy_(getattr(later[5], name))
    graph.replay()
    assert_near(out, expected(later[0], later[4], later[5]))
    assert torch.equal(out, decode(backend, *later[:4], later[5]))
