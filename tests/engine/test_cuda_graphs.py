"""Decode steps that are replayed: equal to eager ones bit for bit, whatever the batch, and whoever comes and goes.

On a machine without CUDA a tape stands for a graph (tests/graph_tape.py).
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import engine.assembly
import engine.loading
from engine.core import EngineCore
from engine.cuda_graphs import CudaCapture, DecodeGraphs, bucket_sizes, graph_capture
from engine.input_batch import InputBatch, build_input_batch, decode_section, pad_decodes
from engine.messages import EngineArgs, EngineRequest, SequenceId
from engine.plan import PlanInProgress, ScheduledSequence, SchedulerOutput
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from model.attention import AttentionMetadata, select_backend
from model.attention.reference import ReferenceBackend
from model.config import Qwen2AudioConfig
from model.kv_cache import allocate_kv_cache
from model.loader import load_model
from model.parallel import WHOLE, Shard
from model.qwen2_audio import Qwen2Audio
from tests.engine.test_overlap import Answer, assert_same, requests, run, take
from tests.graph_tape import DeviceBackend, TapeCapture
from tests.reference import Prompt, noise

P, MAX_LEN, MAX_SEQS = 16, 96, 9
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def test_buckets() -> None:
    assert bucket_sizes(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert bucket_sizes(13) == (1, 2, 4, 8, 13)
    assert bucket_sizes(1) == (1,)
    assert bucket_sizes(3) == (1, 2, 3)


# One step.


def decodes(*lengths: int, pending: bool = False, spare: int = 0) -> InputBatch:
    """Each sequence computes its last token; the first token is not known yet if `pending`. Blocks are scattered."""
    blocks = list(range(1, 1 + sum(-(-length // P) + spare for length in lengths)))
    random.Random(len(lengths)).shuffle(blocks)
    items = []
    for row, length in enumerate(lengths):
        tokens = tuple((7 * row + place) % 900 for place in range(length))
        sequence = Sequence(Prompt.of(*tokens).request(f"r{row}"), seed=row)
        sequence.block_table = [blocks.pop() for _ in range(-(-length // P) + spare)]
        if pending and row == 0:
            del sequence.token_ids[-1]
            sequence.num_pending_tokens = 1
        items.append(ScheduledSequence(sequence, length - 1, 1, True))
    return build_input_batch(SchedulerOutput(tuple(items)), P)


@settings(deadline=None)
@given(st.lists(st.integers(1, MAX_LEN), min_size=1, max_size=MAX_SEQS), st.integers(0, 3), st.booleans())
def test_padding_keeps_the_batch_and_adds_rows_that_do_nothing(
    lengths: list[int], spare: int, pending: bool
) -> None:
    batch = decodes(*lengths, pending=pending, spare=spare)
    width, num_seqs = MAX_LEN // P, len(lengths)
    sections = batch.sections
    for num_rows in range(num_seqs, MAX_SEQS + 1):
        packed = pad_decodes(batch, num_rows, width, {("r0", 0): 5})
        section = decode_section(num_rows)
        assert section % 4 == 0
        parts = packed[: 5 * section].reshape(5, section)
        token_ids, positions, slots, seq_lens, sources = parts[:, :num_rows]
        table = packed[5 * section :].reshape(num_rows, width)
        for ours, theirs in ((token_ids, sections[0]), (positions, sections[1])):
            assert ours.tolist() == [*theirs.tolist(), *[0] * (num_rows - num_seqs)]
        assert seq_lens.tolist() == [*lengths, *[0] * (num_rows - num_seqs)]
        assert slots.tolist() == [*sections[2].tolist(), *[-1] * (num_rows - num_seqs)]
        assert sources.tolist() == [5 if pending else -1, *[-1] * (num_rows - 1)]
        for row, length in enumerate(lengths):
            used = -(-length // P)
            assert table[row, :used].tolist() == sections[5][row, :used].tolist()
        assert not table[num_seqs:].any()


@pytest.fixture(scope="module")
def tiny(gqa_folder: Path) -> Qwen2Audio:
    config = Qwen2AudioConfig.from_folder(gqa_folder)
    return load_model(gqa_folder, config, DeviceBackend(), torch.float32, torch.device("cpu"))


def model_on(device: str, tiny: Qwen2Audio, folder: Path) -> Qwen2Audio:
    """In bfloat16 on CUDA, with the backend that is chosen there."""
    if device == "cpu":
        return tiny
    backend, reason = select_backend("auto", torch.device(device))
    assert backend.supports_graphs, reason
    config = Qwen2AudioConfig.from_folder(folder)
    return load_model(folder, config, backend, torch.bfloat16, torch.device(device))


def captured(model: Qwen2Audio) -> DecodeGraphs:
    """With a cache full of noise."""
    torch.manual_seed(0)
    cache = allocate_kv_cache(model.config.text, 80, P, model.kv_cache_dtype, model.device)
    cache[:, :, 1:].normal_()
    capture = CudaCapture(model.device) if model.device.type == "cuda" else TapeCapture()
    before = cache.clone()
    graphs = DecodeGraphs(model, cache, MAX_SEQS, MAX_LEN, capture)
    graphs.capture()
    assert torch.equal(cache, before), "a capture writes to the cache"
    return graphs


@torch.inference_mode()
def eager(
    graphs: DecodeGraphs, batch: InputBatch, size: int, token_ids: list[int], *, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """The step without a graph, padded alike; `exact`: not padded, and with the true lengths on the host.

    -> logits [B, V], and the cache behind it.
    """
    model, cache, device = graphs._model, graphs._kv_cache.clone(), graphs._model.device
    num_seqs, width = len(batch.query_lens), graphs._width
    if exact:
        size, width = num_seqs, batch.sections[5].shape[1]
    packed = torch.from_numpy(pad_decodes(batch, size, width, {("r0", 0): 0})).to(device)
    section = decode_section(size)
    _, positions, slots, seq_lens, _ = packed[: 5 * section].view(5, section)[:, :size]
    tokens = torch.tensor([*token_ids, *[0] * (size - num_seqs)], dtype=torch.int32, device=device)
    metadata = AttentionMetadata(
        query_lens=(1,) * size,
        seq_lens=batch.seq_lens if exact else (MAX_LEN,) * size,
        num_decodes=size,
        first_blocks=(None,) * size,
        block_table=packed[5 * section :].view(size, width),
        slot_mapping=slots,
        seq_lens_device=seq_lens,
        query_starts=torch.arange(size + 1, dtype=torch.int32, device=device),
    )
    hidden = model(model.embed(tokens), positions, cache, metadata)
    return model.compute_logits(hidden)[:num_seqs], cache


@devices
def test_a_replay_equals_the_eager_step_at_every_batch_size(tiny: Qwen2Audio, gqa_folder: Path, device: str) -> None:
    """Growing and shrinking, so that rows of larger batches are left in the buffers of smaller ones."""
    graphs = captured(model_on(device, tiny, gqa_folder))
    rng = random.Random(0)
    for num_seqs in [*range(1, MAX_SEQS + 1), *range(MAX_SEQS, 0, -1)]:
        batch = decodes(*(rng.choice((1, 2, P - 1, P, P + 1, 50, MAX_LEN)) for _ in range(num_seqs)))
        size = next(size for size in graphs.sizes if size >= num_seqs)
        expected, cache = eager(graphs, batch, size, batch.sections[0].tolist())
        near, _ = eager(graphs, batch, size, batch.sections[0].tolist(), exact=True)
        assert graphs.takes(batch)
        with torch.inference_mode():
            logits = graphs.replay(batch, {}, None)
        assert torch.equal(logits, expected)
        assert torch.equal(graphs._kv_cache[:, :, 1:], cache[:, :, 1:])
        tolerance = 1e-4 if device == "cpu" else 3e-2
        assert (logits - near).abs().max() <= tolerance * near.abs().max()
        assert logits.isfinite().all()


@devices
def test_pending_tokens_are_read_on_the_device(tiny: Qwen2Audio, gqa_folder: Path, device: str) -> None:
    graphs = captured(model_on(device, tiny, gqa_folder))
    batch = decodes(20, 33, 5, pending=True)
    assert batch.pending == ((0, ("r0", 0)),)
    for token in (3, 801):
        sampled = torch.tensor([11, 12, token, 13], device=device)
        expected, _ = eager(graphs, batch, 4, [token, *batch.sections[0][1:].tolist()])
        with torch.inference_mode():
            assert torch.equal(graphs.replay(batch, {("r0", 0): 2}, sampled), expected)


def test_only_steps_of_one_token_without_audio_are_taken(tiny: Qwen2Audio) -> None:
    graphs = captured(tiny)
    assert graphs.takes(decodes(*[5] * MAX_SEQS))
    assert not graphs.takes(decodes(*[5] * (MAX_SEQS + 1)))
    prompt = Sequence(Prompt.of(1, 2, noise(1600), 3).request("r"), seed=0)
    prompt.block_table = [1]
    assert not graphs.takes(build_input_batch(SchedulerOutput((ScheduledSequence(prompt, 0, 2, False),)), P))
    assert not graphs.takes(build_input_batch(SchedulerOutput((ScheduledSequence(prompt, 2, 1, False),)), P))
    assert graphs.takes(build_input_batch(SchedulerOutput((ScheduledSequence(prompt, 1, 1, False),)), P))


def test_the_tape_tells_backends_that_read_lengths_on_the_host(tiny: Qwen2Audio, gqa_folder: Path) -> None:
    """What all these tests rest on: such a backend, captured, gives something else."""

    class Pretender(ReferenceBackend):
        supports_graphs = True

    config = Qwen2AudioConfig.from_folder(gqa_folder)
    model = load_model(gqa_folder, config, Pretender(), torch.float32, torch.device("cpu"))
    cache = allocate_kv_cache(model.config.text, 80, P, torch.float32, model.device)
    graphs = DecodeGraphs(model, cache, 1, MAX_LEN, TapeCapture())
    with pytest.raises(Exception):  # noqa: B017, PT011 -- slot -1 is out of range to it, or its lengths are
        graphs.capture()


def test_the_tape_tells_what_waits_for_the_device() -> None:
    x = torch.ones(3)
    for waits in (lambda: x.sum().item(), lambda: x.tolist(), lambda: x[x > 0], lambda: bool(x.sum() > 0)):
        with pytest.raises(AssertionError, match="waits"):
            TapeCapture()(waits)


def test_which_steps_can_have_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(device: str, backend: ReferenceBackend, shard: Shard = WHOLE) -> Any:
        return SimpleNamespace(device=torch.device(device), backend=backend, shard=shard)

    monkeypatch.setattr(engine.cuda_graphs, "CudaCapture", lambda device: "captured")
    assert graph_capture(on("cuda", DeviceBackend()), enforce_eager=False) == ("captured", "")
    assert graph_capture(on("cuda", DeviceBackend()), enforce_eager=True) == (None, "--enforce-eager")
    for model, word in (
        (on("cpu", DeviceBackend()), "cpu"),
        (on("cuda", ReferenceBackend()), "reference"),
        (on("cuda", DeviceBackend(), Shard(0, 2)), "tensor-parallel"),
    ):
        capture, reason = graph_capture(model, enforce_eager=False)
        assert capture is None
        assert word in reason


# Whole answers.


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> TapeCapture:
    """Engines on a CPU that replay tapes."""
    capture = TapeCapture()
    monkeypatch.setattr(engine.assembly, "graph_capture", lambda *args: (capture, ""))
    monkeypatch.setattr(engine.loading, "select_backend", lambda *args, **_: (DeviceBackend(), "for tests"))
    return capture


def build(folder: Path, **changes: Any) -> EngineCore:
    args = {"device": "cpu", "num_threads": 1, "max_model_len": 128, "max_num_seqs": 12, **changes}
    return EngineCore.build(EngineArgs(str(folder), **args))


@pytest.fixture(scope="module")
def expected(gqa_folder: Path) -> dict[SequenceId, Answer]:
    """Without graphs, by another backend."""
    return run(build(gqa_folder, attention_backend="reference"), requests())


@pytest.fixture(scope="module")
def expected_of_fp8(gqa_folder: Path) -> dict[SequenceId, Answer]:
    """The same with keys and values in float8."""
    return run(build(gqa_folder, attention_backend="reference", kv_cache_dtype="fp8"), requests())


OVERLAP: dict[str, Any] = {"async_scheduling": True}
DRAFTS: dict[str, Any] = {"num_speculative_tokens": 3}
FP8: dict[str, Any] = {"kv_cache_dtype": "fp8"}
TINY: dict[str, Any] = {"kv_cache_memory_bytes": 280_000, "max_num_batched_tokens": 40}
"""Sequences are preempted."""
COMBINATIONS: dict[str, dict[str, Any]] = {
    "graphs": {},
    "graphs, overlap": OVERLAP | {"max_num_seqs": 3},
    "graphs, preemption": TINY,
    "graphs, overlap, preemption": OVERLAP | TINY,
    "graphs, drafts": DRAFTS,
    "graphs, drafts, no prefix cache": DRAFTS | {"max_num_seqs": 3, "enable_prefix_caching": False},
    "graphs, overlap, float8": OVERLAP | FP8,
    "graphs, overlap, float8, preemption": OVERLAP | FP8 | TINY | {"kv_cache_memory_bytes": 70_000},
    "graphs, drafts, float8, preemption": DRAFTS | FP8 | TINY | {"kv_cache_memory_bytes": 70_000},
}
"""Each with sequences that sample, have grammars, penalties, several choices, clips and priorities, side by side."""


def without_the_longest(wanted: list[EngineRequest]) -> list[EngineRequest]:
    return [given for given in wanted if given.request_id != "to the end"]


def answers_to(wanted: list[EngineRequest], answers: dict[SequenceId, Answer]) -> dict[SequenceId, Answer]:
    names = {given.request_id for given in wanted}
    return {key: answer for key, answer in answers.items() if key[0] in names}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_no_combination_changes_an_answer(
    gqa_folder: Path, capture: TapeCapture, request: pytest.FixtureRequest, name: str
) -> None:
    """Steps with drafts run eagerly between replayed ones. The second time prompts are in the prefix cache."""
    changes = COMBINATIONS[name]
    judged = request.getfixturevalue("expected_of_fp8" if "float8" in name else "expected")
    core = build(gqa_folder, **changes)
    sizes = bucket_sizes(core.info.max_num_seqs)
    assert core.info.cuda_graphs.startswith(f"{len(sizes)} of decode steps, up to {sizes[-1]} sequences")
    wanted = [replace(given, priority=place % 3) for place, given in enumerate(requests())]
    if name in ("graphs, overlap", "graphs, overlap, float8"):  # the longest answer takes most of the time
        wanted = without_the_longest(wanted)
    assert_same(run(core, wanted), answers_to(wanted, judged))
    replays, steps = sum(tape.num_replays for tape in capture.tapes), core.stats.num_steps
    assert (replays if "drafts" in name else 2 * replays - steps) > 0
    assert (core.stats.num_draft_tokens > 0) == ("drafts" in name)
    assert (core.stats.num_preemptions > 0) == ("preemption" in name)
    assert core.info.async_scheduling == ("overlap" in name)
    assert (core.info.kv_cache_dtype == "float8_e4m3fn") == ("float8" in name)
    before = core.stats.prefix_cache_hits
    wanted = without_the_longest(wanted)
    assert_same(run(core, wanted), answers_to(wanted, judged))
    assert (core.stats.prefix_cache_hits > before) == ("no prefix" not in name)


@pytest.mark.parametrize("seed", range(2))
def test_nor_do_preemptions_and_aborts_at_any_moment(
    gqa_folder: Path,
    expected: dict[SequenceId, Answer],
    capture: TapeCapture,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    rng = random.Random(seed)
    schedule = Scheduler.schedule

    def rude(scheduler: Scheduler, in_flight: SchedulerOutput | None = None) -> SchedulerOutput:
        if rng.random() < 0.2 and scheduler.running:
            scheduler._preempt(rng.choice(scheduler.running), PlanInProgress(0, 0))
        return schedule(scheduler, in_flight)

    monkeypatch.setattr(Scheduler, "schedule", rude)
    core = build(gqa_folder, async_scheduling=True, max_num_seqs=6)
    waiting = requests()
    rng.shuffle(waiting)
    answers: dict[SequenceId, Answer] = defaultdict(Answer)
    gone: set[str] = set()
    while core.has_work or waiting:
        if waiting and rng.random() < 0.7:
            core.add_request(waiting.pop())
        running = sorted({key[0] for key, answer in answers.items() if answer.ending is None} - gone)
        if running and rng.random() < 0.1:
            gone.add(rng.choice(running))
            for name in gone:
                core.abort(name)
        take(answers, core.step())
        core.scheduler.check_integrity()
    kept = {key: answer for key, answer in expected.items() if key[0] not in gone}
    assert_same({key: answer for key, answer in answers.items() if key[0] not in gone}, kept)
    assert kept
    assert core.stats.num_preemptions


def test_a_row_that_ends_before_it_is_sampled_leaves_the_others(
    gqa_folder: Path, expected: dict[SequenceId, Answer], capture: TapeCapture
) -> None:
    """With a step in flight, an abort comes between the replay and the sampling of its logits."""
    core = build(gqa_folder, async_scheduling=True)
    by_name = {request.request_id: request for request in requests()}
    names = ("greedy", "sampled", "penalties")
    for name in names:
        core.add_request(by_name[name])
    answers: dict[SequenceId, Answer] = defaultdict(Answer)
    sample, dropped = core.runner.sample, 0

    def sample_after_an_abort(step: Any) -> None:
        nonlocal dropped
        if step.logits is not None and len(step.plan.scheduled) == 3 and len(answers["sampled", 0].tokens) == 4:
            core.abort("sampled")
            dropped += 1
        sample(step)

    core.runner.sample = sample_after_an_abort  # type: ignore[method-assign]
    while core.has_work:
        take(answers, core.step())
    assert dropped == 1
    assert answers["sampled", 0].tokens == expected["sampled", 0].tokens[:5]  # the last of the step before
    for name in ("greedy", "penalties"):
        assert answers[name, 0].tokens == expected[name, 0].tokens


def test_a_replay_that_fails_is_a_step_that_fails(
    gqa_folder: Path, expected: dict[SequenceId, Answer], capture: TapeCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = build(gqa_folder, async_scheduling=True)
    replay, calls = DecodeGraphs.replay, 0

    def brittle(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise torch.OutOfMemoryError("once")
        return replay(*args)

    monkeypatch.setattr(DecodeGraphs, "replay", brittle)
    assert_same(run(core, requests()), expected)
    assert calls > 5


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True], ids=["one by one", "overlap"])
def test_real_graphs_change_no_answer(gqa_folder: Path, overlap: bool) -> None:
    on_gpu: dict[str, Any] = {"device": "cuda", "dtype": "float32", "gpu_memory_utilization": 0.5}
    plain = build(gqa_folder, **on_gpu, async_scheduling=False, enforce_eager=True)
    expected = run(plain, requests())
    core = build(gqa_folder, **on_gpu, async_scheduling=overlap)
    assert "of decode steps" in core.info.cuda_graphs
    assert plain.info.cuda_graphs == "off (--enforce-eager)"
    assert_same(run(core, requests()), expected)
