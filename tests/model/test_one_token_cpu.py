"""A step of one token as one call of compiled code, against the layers one by one."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.errors import EngineStartError
from engine.messages import EngineArgs
from engine.precision import check_quantization
from model import gemm_cpu
from model.attention import AttentionMetadata, select_backend
from model.config import Qwen2AudioConfig, TextConfig
from model.cpu import can_pack, prepare_for_cpu
from model.gemv_cpu import packed_blocks
from model.kv_cache import allocate_kv_cache
from model.linear import Linear
from model.loader import load_model
from model.one_token_cpu import OneTokenPass, can_run
from model.parallel import WHOLE
from model.qwen2 import Qwen2Decoder

CPU = torch.device("cpu")
BLOCK_SIZE = 16
NUM_BLOCKS = 80


@pytest.fixture(scope="module", params=list(filter(can_pack, [torch.float32, torch.bfloat16])), ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    kind: torch.dtype = request.param
    return kind


def shape(num_kv_heads: int) -> TextConfig:
    return TextConfig(
        vocab_size=50,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=num_kv_heads,
        head_dim=16,
    )


def make_cache(num_kv_heads: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(allocate_kv_cache(shape(num_kv_heads), NUM_BLOCKS, BLOCK_SIZE, dtype, CPU).shape).to(dtype)


def make_decoder(dtype: torch.dtype, num_kv_heads: int, *, int8: bool = False) -> Qwen2Decoder:
    torch.manual_seed(num_kv_heads)
    backend, _ = select_backend("cpu", CPU, dtype=dtype)
    decoder = Qwen2Decoder(shape(num_kv_heads), backend, WHOLE).requires_grad_(False)
    for name, parameter in decoder.named_parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.3 if "norm" in name else 0.1) + ("norm" in name))
    decoder = decoder.to(dtype).eval()
    for module in decoder.layers.modules():
        if isinstance(module, Linear):
            module.pack(int8=int8)
    return decoder


def one_step(decoder: Qwen2Decoder, hidden: Tensor, length: int, cache: Tensor, rows: Tensor | None) -> Tensor:
    """The token at the end of a sequence of `length`."""
    return step(decoder, hidden, [length], cache, rows)


def step(
    decoder: Qwen2Decoder, hidden: Tensor, lengths: list[int], cache: Tensor, rows: Tensor | None = None
) -> Tensor:
    """One token at the end of each sequence of these lengths, whose blocks lie backwards in the cache."""
    table = torch.zeros(len(lengths), -(-max(lengths) // BLOCK_SIZE), dtype=torch.int32)
    free = iter(range(NUM_BLOCKS - 1, -1, -1))
    slots = []
    for row, length in enumerate(lengths):
        blocks = [next(free) for _ in range(-(-length // BLOCK_SIZE))]
        table[row, : len(blocks)] = torch.tensor(blocks)
        slots.append(blocks[-1] * BLOCK_SIZE + (length - 1) % BLOCK_SIZE)
    metadata = AttentionMetadata(
        query_lens=(1,) * len(lengths),
        seq_lens=tuple(lengths),
        num_decodes=len(lengths),
        first_blocks=(None,) * len(lengths),
        block_table=table,
        slot_mapping=torch.tensor(slots, dtype=torch.int32),
        seq_lens_device=torch.tensor(lengths, dtype=torch.int32),
        query_starts=torch.arange(len(lengths) + 1, dtype=torch.int32),
    )
    positions = torch.tensor(lengths, dtype=torch.int32) - 1
    return decoder(hidden, positions, cache, metadata, rows)


def close(ours: Tensor, theirs: Tensor) -> None:
    if ours.dtype == torch.float32:
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    else:
        assert (ours == theirs).float().mean() > 0.9, "a sum in another order may tip a tie"
        torch.testing.assert_close(ours, theirs, atol=0.06, rtol=0.02)


@torch.inference_mode()
@pytest.mark.parametrize("num_kv_heads", [6, 2, 1])
def test_it_computes_what_the_layers_do_and_writes_the_same_cache(dtype: torch.dtype, num_kv_heads: int) -> None:
    decoder = make_decoder(dtype, num_kv_heads)
    assert can_run(decoder)
    filled = make_cache(num_kv_heads, dtype)
    one_token = OneTokenPass(decoder)
    for length in (1, 2, 15, 16, 17, 33, 600):
        hidden = torch.randn(1, 96).to(dtype)
        expected_cache, cache = filled.clone(), filled.clone()
        decoder.one_token = None
        expected = one_step(decoder, hidden, length, expected_cache, None)
        decoder.one_token = one_token
        ours = one_step(decoder, hidden, length, cache, None)
        close(ours, expected)
        close(cache, expected_cache)


class Counted:
    """A pass that tells of how many tokens its steps were."""

    def __init__(self, decoder: Qwen2Decoder) -> None:
        self.run = OneTokenPass(decoder)
        self.max_rows = self.run.max_rows
        self.steps: list[int] = []

    def __call__(self, hidden: Tensor, *others: Any) -> Tensor:
        self.steps.append(len(hidden))
        return self.run(hidden, *others)


LENGTHS = [1, 33, 16, 17, 200, 2, 5, 48, *range(1, 26)]
"""Of 33 sequences: one more than a pass takes."""


@torch.inference_mode()
@pytest.mark.parametrize("num_kv_heads", [6, 2])
def test_several_sequences_go_at_once_where_the_cpu_can(dtype: torch.dtype, num_kv_heads: int) -> None:
    decoder = make_decoder(dtype, num_kv_heads)
    counted = Counted(decoder)
    takes = [1, 2, 3, 9, 32] if dtype == torch.bfloat16 and gemm_cpu.can_run() else [1]
    filled = make_cache(num_kv_heads, dtype)
    for count in (2, 1, 3, 9, 32, 33):
        hidden = torch.randn(count, 96).to(dtype)
        expected_cache, cache = filled.clone(), filled.clone()
        decoder.one_token = None
        expected = step(decoder, hidden, LENGTHS[:count], expected_cache)
        decoder.one_token = counted
        close(step(decoder, hidden, LENGTHS[:count], cache), expected)
        close(cache, expected_cache)
    assert sorted(counted.steps) == takes


@torch.inference_mode()
@pytest.mark.skipif(not gemm_cpu.can_run(), reason="this CPU does not multiply bfloat16")
def test_a_row_is_the_same_in_any_company_and_poisons_none() -> None:
    decoder = make_decoder(torch.bfloat16, 2)
    decoder.one_token = OneTokenPass(decoder)
    hidden = torch.randn(9, 96).bfloat16()
    filled = make_cache(2, torch.bfloat16)
    two = step(decoder, hidden[:2], LENGTHS[:2], filled.clone())
    assert torch.equal(step(decoder, hidden, LENGTHS[:9], filled.clone())[:2], two)
    hidden[4, 5] = float("nan")
    poisoned = step(decoder, hidden, LENGTHS[:9], filled.clone())
    assert poisoned.isnan().any(dim=1).tolist() == [row == 4 for row in range(9)]
    assert torch.equal(poisoned[:2], two)
    assert torch.equal(step(decoder, hidden[:3], LENGTHS[:3], filled.clone())[:2], two), "what was left is not read"


@torch.inference_mode()
def test_two_tokens_of_one_sequence_are_not_such_a_step(dtype: torch.dtype) -> None:
    decoder = make_decoder(dtype, 6)
    cache = make_cache(6, dtype)
    hidden = torch.randn(2, 96).to(dtype)
    metadata = AttentionMetadata(
        query_lens=(2,),
        seq_lens=(5,),
        num_decodes=0,
        first_blocks=(7,),
        block_table=torch.tensor([[7]], dtype=torch.int32),
        slot_mapping=torch.tensor([115, 116], dtype=torch.int32),
        seq_lens_device=torch.tensor([5], dtype=torch.int32),
        query_starts=torch.tensor([0, 2], dtype=torch.int32),
    )
    positions = torch.tensor([3, 4], dtype=torch.int32)
    expected = decoder(hidden, positions, cache.clone(), metadata)
    decoder.one_token = counted = Counted(decoder)
    assert torch.equal(decoder(hidden, positions, cache.clone(), metadata), expected)
    assert counted.steps == []


@torch.inference_mode()
def test_rows_are_taken_and_what_was_given_stays(dtype: torch.dtype) -> None:
    decoder = make_decoder(dtype, 6)
    decoder.one_token = OneTokenPass(decoder)
    cache = make_cache(6, dtype)
    hidden = torch.randn(1, 96).to(dtype)
    before = hidden.clone()
    first = one_step(decoder, hidden, 1, cache, None)
    kept = first.clone()
    assert torch.equal(hidden, before)
    assert one_step(decoder, hidden, 1, cache, torch.tensor([], dtype=torch.int64)).shape == (0, 96)
    assert torch.equal(one_step(decoder, hidden, 1, cache, torch.tensor([0])), first)
    one_step(decoder, torch.randn(1, 96).to(dtype), 2, cache, None)
    assert torch.equal(first, kept), "a later step must not write into an earlier one's result"


@torch.inference_mode()
def test_what_is_not_a_number_stays_so(dtype: torch.dtype) -> None:
    decoder = make_decoder(dtype, 6)
    decoder.one_token = OneTokenPass(decoder)
    cache = make_cache(6, dtype)
    poisoned = torch.randn(1, 96).to(dtype)
    poisoned[0, 3] = float("nan")
    assert not one_step(decoder, poisoned, 1, cache, None).isfinite().any()
    assert one_step(decoder, torch.randn(1, 96).to(dtype), 1, cache, None).isfinite().all()


def test_weights_of_8_bits_keep_their_own_product() -> None:
    assert not can_run(make_decoder(torch.float32, 6, int8=True))


def test_only_the_attention_that_was_chosen_runs(mha_folder: Path) -> None:
    config = Qwen2AudioConfig.from_folder(mha_folder)
    for name in ("cpu", "reference"):
        backend, _ = select_backend(name, CPU)
        model = load_model(mha_folder, config, backend, torch.float32, CPU)
        prepare_for_cpu(model)
        assert (model.decoder.one_token is not None) == (name == "cpu")


def test_what_the_cpu_cannot_pack_stays_as_loaded(mha_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without AVX-512, told to use bfloat16."""
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: False)
    backend, _ = select_backend("cpu", CPU)
    model = load_model(mha_folder, Qwen2AudioConfig.from_folder(mha_folder), backend, torch.bfloat16, CPU)
    prepare_for_cpu(model)
    assert model.decoder.one_token is None
    assert model.lm_head.weight.dtype == torch.bfloat16
    args = EngineArgs(str(mha_folder), device="cpu", dtype="bfloat16", quantization="int8")
    with pytest.raises(EngineStartError, match=r"--quantization int8: .* in bfloat16; use --dtype float32"):
        check_quantization(args, CPU, torch.bfloat16)
    with pytest.raises(EngineStartError, match="in float16"):
        check_quantization(args, CPU, torch.float16)


@torch.inference_mode()
def test_a_layout_is_believed_only_where_the_weight_is_found_in_it(dtype: torch.dtype) -> None:
    weight = torch.randn(200, 96).to(dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    assert packed_blocks(packed, weight) is not None
    other = weight.clone()
    other[199, 95] += 1
    assert packed_blocks(packed, other) is None
    assert packed_blocks(packed, torch.randn(200, 48).to(dtype)) is None
    ragged = torch.randn(128, 100).to(dtype)
    assert packed_blocks(torch.ops.mkldnn._reorder_linear_weight(ragged), ragged) is None


@contextmanager
def one_core_for_all() -> Iterator[None]:
    """Every thread, and one that comes and goes at random, on one core: each loses it at any place."""
    allowed = os.sched_getaffinity(0)
    done = threading.Event()

    def disturb() -> None:
        generator = np.random.default_rng(0)
        block = generator.random((150, 150))
        while not done.wait(generator.random() / 500):
            block @ block

    other = threading.Thread(target=disturb)
    other.start()
    try:
        move_threads({min(allowed)})
        yield
    finally:
        done.set()
        other.join()
        move_threads(allowed)


def move_threads(cores: set[int]) -> None:
    for name in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(name), cores)


@torch.inference_mode()
@pytest.mark.parametrize("num_threads", [2, 5])
def test_threads_that_lose_their_core_change_no_bit(dtype: torch.dtype, num_threads: int) -> None:
    """Work is dealt by counters and done in scratch of the thread's own: who does it, and when, must not matter."""
    decoder = make_decoder(dtype, 6)
    filled = make_cache(6, dtype)
    steps = [(torch.randn(1, 96).to(dtype), length) for length in (1, 33, 200, 600)]

    def all_steps() -> list[Tensor]:
        decoder.one_token = OneTokenPass(decoder)
        cache = filled.clone()
        return [*(one_step(decoder, hidden, length, cache, None) for hidden, length in steps), cache]

    expected = all_steps()
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        all_steps()  # the threads are there
        with one_core_for_all():
            for _ in range(2):
                assert all(map(torch.equal, all_steps(), expected))
    finally:
        torch.set_num_threads(before)
