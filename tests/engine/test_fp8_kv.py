"""A KV cache in float8: twice the blocks, and the same answers with chunks, cached prefixes and preemption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core import EngineCore
from engine.errors import EngineStartError
from engine.messages import EngineOutput
from model import fp8
from model.kv_cache import bytes_per_block
from tests.engine.test_parity import args_of, request_of, run

NAMES = ["no audio", "7.3 s", "two audios in one message", "audio last"]
BUDGET = 3 << 20


def build(folder: Path, **changes: Any) -> EngineCore:
    return EngineCore.build(args_of(folder, kv_cache_dtype="fp8", **changes))


@pytest.fixture(scope="module")
def whole(gqa_folder: Path) -> dict[str, list[int]]:
    """Greedy tokens of each prompt, computed whole and alone."""
    tokens = {}
    for name in NAMES:
        tokens |= run(build(gqa_folder, max_num_batched_tokens=2048), [name])
    return tokens


def test_a_budget_holds_twice_as_many_blocks_as_in_bfloat16(gqa_folder: Path) -> None:
    changes: dict[str, Any] = {"kv_cache_memory_bytes": BUDGET, "max_model_len": 1024, "dtype": "bfloat16"}
    plain = EngineCore.build(args_of(gqa_folder, **changes))
    small = build(gqa_folder, **changes)
    assert plain.runner.kv_cache.dtype == torch.bfloat16
    assert small.runner.kv_cache.dtype == fp8.DTYPE
    assert small.info.kv_cache_dtype == "float8_e4m3fn"
    blocks = [core.info.num_blocks - 1 for core in (plain, small)]  # the null block is not counted in the budget
    assert blocks[1] == 2 * blocks[0]
    text = small.runner.model.config.text
    assert blocks[1] * bytes_per_block(text, small.info.block_size, fp8.DTYPE) == BUDGET


@pytest.mark.parametrize("changes", [{"max_num_batched_tokens": 17}, {"max_num_batched_tokens": 64}, {}], ids=str)
def test_chunks_give_the_tokens_of_whole_prompts(
    gqa_folder: Path, whole: dict[str, list[int]], changes: dict[str, Any]
) -> None:
    assert run(build(gqa_folder, **changes), NAMES) == whole


def test_a_cached_prefix_gives_the_tokens_of_a_computed_one(gqa_folder: Path, whole: dict[str, list[int]]) -> None:
    core = build(gqa_folder)
    for _ in range(2):
        assert run(core, NAMES) == whole
    assert core.stats.prefix_cache_hits > 100


def test_preempted_sequences_and_copied_blocks_give_the_same_tokens(
    gqa_folder: Path, whole: dict[str, list[int]]
) -> None:
    block = bytes_per_block(build(gqa_folder).runner.model.config.text, 16, fp8.DTYPE)
    core = build(gqa_folder, kv_cache_memory_bytes=16 * block, max_model_len=256, enable_prefix_caching=False)
    assert run(core, NAMES) == whole
    assert core.stats.num_preemptions > 0
    core = build(gqa_folder)
    core.add_request(replace(request_of("7.3 s"), n=3))
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    while core.has_work:
        for output in core.step():
            tokens[output.index] += output.new_token_ids
    assert list(tokens.values()) == 3 * [whole["7.3 s"]]


def test_what_is_not_a_number_ends_its_own_request(gqa_folder: Path, whole: dict[str, list[int]]) -> None:
    """A float8 cache could hide it: saturation makes numbers of infinities."""
    core = build(gqa_folder)
    core.add_request(request_of("no audio"))
    core.add_request(request_of("audio last"))
    outputs: list[EngineOutput] = core.step()
    victim = next(s for s in core.scheduler.running if s.sequence_id[0] == "no audio")
    core.runner.kv_cache[1, 0, victim.block_table[0], 0] = float("nan")
    while core.has_work:
        outputs += core.step()
    errors = {output.request_id: output.error for output in outputs if output.finish_reason}
    assert errors["no audio"] is not None
    assert errors["audio last"] is None
    tokens = [token for output in outputs if output.request_id == "audio last" for token in output.new_token_ids]
    assert tokens == whole["audio last"]


def test_what_cannot_be_honoured_is_refused_by_name(gqa_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineStartError, match="fp8_e5m2"):
        EngineCore.build(args_of(gqa_folder, kv_cache_dtype="fp8_e5m2"))
    monkeypatch.setattr("model.attention.reference.ReferenceBackend.supports_fp8_kv", False)
    with pytest.raises(EngineStartError, match="attention backend reference"):
        EngineCore.build(args_of(gqa_folder, kv_cache_dtype="fp8", attention_backend="reference"))
    with pytest.raises(EngineStartError, match="--quantization fp8 is for --device cuda"):
        EngineCore.build(args_of(gqa_folder, quantization="fp8"))


def test_random_weights_have_the_smaller_cache_too(gqa_folder: Path) -> None:
    core = build(gqa_folder, load_format="dummy")
    assert core.runner.kv_cache.dtype == fp8.DTYPE
    assert all(len(tokens) == 32 for tokens in run(core, ["no audio"]).values())
