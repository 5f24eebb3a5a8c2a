"""What is left for the KV cache, on a pretended GPU: whose memory counts, and what is said if it is too little."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import engine.assembly
import engine.loading
import engine.memory
from engine import choice
from engine.core import EngineCore
from engine.cuda_graphs import DecodeGraphs
from engine.errors import EngineStartError
from engine.memory import MemoryUse, graph_bytes, measure, num_kv_blocks, peak_bytes, run_largest_step
from engine.messages import EngineArgs
from model.config import Qwen2AudioConfig
from model.kv_cache import allocate_kv_cache, bytes_per_block, copy_blocks
from model.loader import load_model
from model.qwen2_audio import Qwen2Audio
from tests.graph_tape import DeviceBackend, TapeCapture

GIB = 1 << 30
MIB = 1 << 20


@dataclass
class FakeGpu:
    """torch.cuda's account of a GPU. `run` is a step that takes and gives back."""

    total: int = 80 * GIB
    others: int = 0
    """Other processes', and the driver's."""
    reserved: int = 0
    """By torch's allocator; some of it `unused`, which only empty_cache gives back."""
    unused: int = 0
    peak: int = 0

    def take(self, size: int) -> None:
        reused = min(size, self.unused)
        if self.reserved + size - reused + self.others > self.total:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.unused -= reused
        self.reserved += size - reused
        self.peak = max(self.peak, self.reserved)

    def give_back(self, size: int) -> None:
        self.unused += size

    def run(self, *sizes: int) -> None:
        for size in sizes:
            self.take(size)
            self.give_back(size)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def empty_cache() -> None:
            self.reserved, self.unused = self.reserved - self.unused, 0

        def reset_peak(_: Any) -> None:
            self.peak = self.reserved

        functions: dict[str, Callable[..., Any]] = {
            "mem_get_info": lambda _: (self.total - self.others - self.reserved, self.total),
            "memory_reserved": lambda _: self.reserved,
            "max_memory_reserved": lambda _: self.peak,
            "reset_peak_memory_stats": reset_peak,
            "empty_cache": empty_cache,
            "synchronize": lambda _: None,
        }
        for name, function in functions.items():
            monkeypatch.setattr(torch.cuda, name, function)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    fake.install(monkeypatch)
    return fake


@pytest.fixture(scope="module")
def tiny(gqa_folder: Path) -> Qwen2Audio:
    config = Qwen2AudioConfig.from_folder(gqa_folder)
    return load_model(gqa_folder, config, DeviceBackend(), torch.float32, torch.device("cpu"))


class OnCuda:
    """A model that says it is on a GPU."""

    def __init__(self, model: Qwen2Audio) -> None:
        self.config, self.dtype, self.backend = model.config, model.dtype, model.backend
        self.kv_cache_dtype = model.kv_cache_dtype
        self.device = torch.device("cuda")
        self.shard = model.shard


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu, tiny: Qwen2Audio) -> Callable[..., MemoryUse]:
    """`measure` on the fake GPU: weights of 16 GiB, steps of sizes, graphs of sizes, the largest first."""

    def run(steps: tuple[int, ...], graphs: tuple[int, ...] = (), **changes: Any) -> MemoryUse:
        sizes = list(graphs)
        gpu.take(16 * GIB)

        def allocate(*args: Any) -> torch.Tensor:
            kv_cache = allocate_kv_cache(*args[:-1], torch.device("cpu"))
            gpu.take(kv_cache.numel() * kv_cache.element_size())
            return kv_cache

        class FakeGraphs:
            def __init__(self, *_: Any) -> None:
                self.sizes, self.num_bytes = (1, 2, 4, 8), 0

            def capture(self, *sizes_of_batches: int) -> None:
                for _ in sizes_of_batches:
                    gpu.others += sizes[0]
                    self.num_bytes += sizes.pop(0)

        monkeypatch.setattr(engine.memory, "allocate_kv_cache", allocate)
        monkeypatch.setattr(engine.memory, "run_largest_step", lambda *_: gpu.run(*steps))
        monkeypatch.setattr(engine.memory, "graph_capture", lambda *_: ("a capture" if graphs else None, ""))
        monkeypatch.setattr(engine.memory, "DecodeGraphs", FakeGraphs)
        monkeypatch.setattr(engine.memory, "EncoderGraphs", FakeGraphs)
        args = EngineArgs("", **{"max_num_batched_tokens": 64, "encoder_cache_bytes": 128 * MIB, **changes})
        return measure(args, OnCuda(tiny), 16, 128)  # type: ignore[arg-type]

    return run


def test_the_kv_cache_gets_what_the_worst_step_leaves(measured: Callable[..., MemoryUse]) -> None:
    """Not the sum of all steps, and not the cache that the trial itself wrote to."""
    use = measured((2 * GIB, 5 * GIB, 3 * GIB))
    assert use == MemoryUse(80 * GIB, 0, 21 * GIB, 0, 128 * MIB)
    assert use.left(0.9) == int(80 * GIB * 0.9) - 21 * GIB - 128 * MIB
    assert use.left(1.0) == 59 * GIB - 128 * MIB


def test_others_memory_is_not_ours(measured: Callable[..., MemoryUse], gpu: FakeGpu) -> None:
    gpu.others = 30 * GIB
    use = measured((5 * GIB,))
    assert use.elsewhere == 30 * GIB
    assert use.left(0.9) == int(80 * GIB * 0.9) - 51 * GIB - 128 * MIB


def test_what_loading_has_left_behind_is_given_back_first(measured: Callable[..., MemoryUse], gpu: FakeGpu) -> None:
    gpu.run(40 * GIB)
    assert measured((5 * GIB,)).needed == 21 * GIB


def test_fragmentation_counts_as_the_allocator_holds_it(gpu: FakeGpu) -> None:
    """What is in use is less than what is held: service needs the latter."""

    def fragment() -> None:
        gpu.take(GIB)
        gpu.take(GIB)
        gpu.give_back(GIB)
        gpu.unused = 0  # the hole fits nobody
        gpu.take(GIB)

    assert peak_bytes(torch.device("cuda"), fragment) == 3 * GIB


def test_graphs_are_counted_by_two_of_them(measured: Callable[..., MemoryUse], gpu: FakeGpu) -> None:
    """The largest of a kind brings the pool; each of the other three takes as much as the second."""
    assert measured((GIB,), (600 * MIB, 20 * MIB, 200 * MIB, 10 * MIB)).graphs == 660 * MIB + 230 * MIB
    gpu.others = 0
    assert measured((GIB,)).graphs == 0


def test_one_graph_is_counted_as_it_is(gpu: FakeGpu, tiny: Qwen2Audio) -> None:
    cache = allocate_kv_cache(tiny.config.text, 2, 16, torch.float32, tiny.device)
    graphs = DecodeGraphs(tiny, cache, 1, 32, TapeCapture())
    assert graphs.sizes == (1,)
    assert graph_bytes(graphs) == 0  # on a CPU


def test_clips_that_must_fit_are_counted(measured: Callable[..., MemoryUse], tiny: Qwen2Audio) -> None:
    """At least one clip stays on the device, however small a cache was asked for."""
    assert measured((GIB,), encoder_cache_bytes=0).encoder_cache == 750 * 128 * 4


@pytest.mark.parametrize("utilization", [0.5, 0.7, 0.92])
def test_blocks_fill_the_budget_up_to_what_all_could_use(
    measured: Callable[..., MemoryUse], monkeypatch: pytest.MonkeyPatch, tiny: Qwen2Audio, utilization: float
) -> None:
    use = measured((5 * GIB,))
    monkeypatch.setattr(engine.memory, "measure", lambda *_: use)
    block = bytes_per_block(tiny.config.text, 16, torch.float32)
    args = EngineArgs("", max_num_seqs=10**6, gpu_memory_utilization=utilization)
    model: Any = OnCuda(tiny)
    assert num_kv_blocks(args, model, 16, 4096) == use.left(utilization) // block + 1
    few = EngineArgs("", max_num_seqs=3, gpu_memory_utilization=utilization)
    assert num_kv_blocks(few, model, 16, 4096) == 3 * 256 + 1


def test_a_number_of_bytes_wins_and_nothing_is_run(monkeypatch: pytest.MonkeyPatch, tiny: Qwen2Audio) -> None:
    def no(*_: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(engine.memory, "measure", no)
    block = bytes_per_block(tiny.config.text, 16, torch.float32)
    args = EngineArgs("", kv_cache_memory_bytes=20 * block + 5, gpu_memory_utilization=0.01)
    assert num_kv_blocks(args, OnCuda(tiny), 16, 128) == 21  # type: ignore[arg-type]


def test_too_little_is_an_error_that_says_who_has_it_and_what_to_lower(
    measured: Callable[..., MemoryUse], monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu, tiny: Qwen2Audio
) -> None:
    gpu.others = 50 * GIB
    use = measured((9 * GIB,), (600 * MIB, 20 * MIB, 200 * MIB, 10 * MIB))
    monkeypatch.setattr(engine.memory, "measure", lambda *_: use)
    with pytest.raises(EngineStartError) as caught:
        num_kv_blocks(EngineArgs(""), OnCuda(tiny), 16, 4096)  # type: ignore[arg-type]
    text = str(caught.value)
    assert text.startswith("the KV cache holds 0 tokens, --max-model-len is 4096: lower that")
    flags = ("kv-cache-memory-bytes", "gpu-memory-utilization", "max-num-batched-tokens", "max-num-seqs")
    assert all(f"--{flag}" in text for flag in (*flags, "enforce-eager"))
    for size in ("80.00 GiB", "have 50.00", "take 25.00", "graphs 0.87", "clips 0.12"):
        assert size in text


def test_a_step_that_does_not_fit_at_all_says_what_to_lower(measured: Callable[..., MemoryUse]) -> None:
    with pytest.raises(EngineStartError, match="largest step: lower --max-num-batched-tokens or --max-num-seqs"):
        measured((70 * GIB,))


def test_weights_or_graphs_that_do_not_fit_say_so(
    measured: Callable[..., MemoryUse], gqa_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    args = EngineArgs(str(gqa_folder), device="cpu", num_threads=1, max_model_len=128)
    with monkeypatch.context() as patch:
        patch.setattr(engine.loading, "load_model", full)
        with pytest.raises(EngineStartError, match="loading: the weights need a larger GPU"):
            EngineCore.build(args)
    with monkeypatch.context() as patch:
        patch.setattr(engine.assembly, "ModelRunner", full)
        with pytest.raises(EngineStartError, match="KV cache: lower --gpu-memory-utilization"):
            EngineCore.build(args)
    with monkeypatch.context() as patch:
        patch.setattr(engine.memory, "graph_bytes", full)
        with pytest.raises(EngineStartError, match="CUDA graphs: lower --max-num-seqs, or set --enforce-eager"):
            measured((GIB,), (GIB, GIB))


def test_the_largest_step_is_all_of_it(tiny: Qwen2Audio, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows of logits sorted, behind which the tables of penalties stay; the encoder's largest runs; copies of
    blocks for all choices; the whole token budget, and a row of logits for each draft."""
    happened: list[tuple[str, int]] = []
    encode, logits, sort, copy = tiny.encode_audio, tiny.compute_logits, choice._sample_sorted, copy_blocks

    def encode_audio(clips: Any) -> Any:
        happened.append(("frames", sum(len(clip) // 160 for clip in clips)))
        happened.append(("clips", len(clips)))
        return encode(clips[:1])

    def compute_logits(hidden: torch.Tensor) -> torch.Tensor:
        happened.append(("rows", len(hidden)))
        return logits(hidden)

    def sample_sorted(chosen: torch.Tensor, *rest: Any) -> torch.Tensor:
        happened.append(("sorted", len(chosen)))
        return sort(chosen, *rest)

    def copy_counted(cache: torch.Tensor, pairs: torch.Tensor) -> None:
        happened.append(("copies", len(pairs)))
        copy(cache, pairs)

    monkeypatch.setattr(tiny, "encode_audio", encode_audio)
    monkeypatch.setattr(tiny, "compute_logits", compute_logits)
    monkeypatch.setattr(choice, "_sample_sorted", sample_sorted)
    monkeypatch.setattr(engine.memory, "copy_blocks", copy_counted)
    args = EngineArgs("", max_num_batched_tokens=64, max_num_seqs=5, num_speculative_tokens=2)
    cache = allocate_kv_cache(tiny.config.text, 5, 16, torch.float32, tiny.device)
    run_largest_step(args, tiny, cache)
    many = args.max_encoder_frames // 64
    assert happened == [
        *(("sorted", 15), ("frames", args.max_encoder_frames), ("clips", 4), ("frames", 64 * many), ("clips", 64)),
        *(("copies", 5), ("rows", 15), ("sorted", 15)),
    ]
    run_largest_step(EngineArgs("", max_num_batched_tokens=16, max_num_seqs=64), tiny, cache[:, :, :2])
    assert happened[-2:] == [("rows", 16), ("sorted", 16)]


@pytest.mark.gpu
def test_a_real_engine_keeps_to_its_share(gqa_folder: Path) -> None:
    """Its largest steps, run for real behind the start, take no more than was measured."""
    before = torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]
    share = (before + 6 * GIB) / torch.cuda.mem_get_info()[1]
    args = EngineArgs(str(gqa_folder), device="cuda", gpu_memory_utilization=share)
    core = EngineCore.build(args)
    cache = core.runner.kv_cache
    for _ in range(3):
        run_largest_step(
            EngineArgs("", max_num_batched_tokens=1024, max_num_seqs=64), core.runner.model, cache[:, :, :65]
        )
    free, total = torch.cuda.mem_get_info()
    assert total - free <= share * total
