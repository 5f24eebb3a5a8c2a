"""Sharded layers, and a sharded model from a checkpoint, against the same unsharded; what a rank reads of a file."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import model.weight_files
from model.attention import AttentionMetadata, select_backend
from model.config import Qwen2AudioConfig, TextConfig
from model.cpu import prepare_for_cpu
from model.errors import ConfigError
from model.kv_cache import allocate_kv_cache
from model.layers import VocabEmbedding
from model.linear import Linear, RowParallelLinear
from model.loader import load_model, name_table
from model.parallel import WHOLE, Shard
from model.quantization.fp8_linear import round_to_fp8
from model.qwen2 import Mlp
from model.qwen2_audio import Qwen2Audio
from tests.ranks import on_ranks

CPU = torch.device("cpu")
SIZES = st.sampled_from([1, 2, 3, 4, 8])


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 9), st.integers(1, 40), st.integers(0, 20), st.booleans(), st.booleans())
def test_row_parallel_products_sum_up_and_add_the_residual_once(
    size: int, part: int, outputs: int, rows: int, packed: bool, with_residual: bool
) -> None:
    torch.manual_seed(size * part + outputs)
    whole = Linear(size * part, outputs, bias=False).requires_grad_(False)
    x = torch.randn(rows, size * part)
    residual = torch.randn(rows, outputs) if with_residual else None

    def of_rank(shard: Shard) -> Tensor:
        layer = RowParallelLinear(part, outputs, shard).requires_grad_(False)
        columns = slice(shard.rank * part, (shard.rank + 1) * part)
        layer.weight.copy_(whole.weight[:, columns])
        if packed:
            layer.pack()
        return layer(x[:, columns], residual)

    expected = whole(x, residual)
    for out in on_ranks(size, of_rank):
        close(out, expected)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 9), st.integers(0, 20), st.data())
def test_each_token_is_found_on_the_rank_that_has_it(size: int, part: int, num_tokens: int, data: Any) -> None:
    table = torch.randn(size * part, 6)
    ids = data.draw(st.lists(st.integers(0, size * part - 1), min_size=num_tokens, max_size=num_tokens))
    token_ids = torch.tensor(ids, dtype=torch.int32)

    def of_rank(shard: Shard) -> Tensor:
        layer = VocabEmbedding(size * part, 6, shard).requires_grad_(False)
        layer.weight.copy_(table[shard.rank * part : (shard.rank + 1) * part])
        return layer(token_ids)

    for out in on_ranks(size, of_rank):
        assert torch.equal(out, table[token_ids.long()])


@settings(max_examples=20, deadline=None)
@given(SIZES, st.integers(1, 8), st.integers(1, 12))
def test_a_feed_forward_block_shared_by_columns(size: int, part: int, rows: int) -> None:
    config = TextConfig(hidden_size=16, intermediate_size=size * part)
    torch.manual_seed(part)
    whole = Mlp(config, WHOLE).requires_grad_(False)
    x, residual = torch.randn(rows, 16), torch.randn(rows, 16)
    gate, up = whole.gate_up_proj.weight.chunk(2)

    def of_rank(shard: Shard) -> Tensor:
        mine = slice(shard.rank * part, (shard.rank + 1) * part)
        mlp = Mlp(replace(config, intermediate_size=part), shard).requires_grad_(False)
        mlp.gate_up_proj.weight.copy_(torch.cat((gate[mine], up[mine])))
        mlp.down_proj.weight.copy_(whole.down_proj.weight[:, mine])
        return mlp(x, residual)

    expected = whole(x, residual)
    for out in on_ranks(size, of_rank):
        close(out, expected)


def prefill(model: Qwen2Audio, token_ids: Tensor) -> Tensor:
    """Two sequences through the model's own part of the cache. -> logits [T, V], on rank 0 of all columns."""
    half = len(token_ids) // 2
    lens = (half, len(token_ids) - half)
    kv_cache = allocate_kv_cache(model.config.text, 5, 16, torch.float32, CPU)
    positions = torch.cat([torch.arange(n) for n in lens]).int()
    blocks = torch.tensor([[1, 2], [4, 3]], dtype=torch.int32)
    rows = torch.repeat_interleave(torch.arange(2), torch.tensor(lens))
    metadata = AttentionMetadata(
        query_lens=lens,
        seq_lens=lens,
        num_decodes=0,
        first_blocks=(1, None),
        block_table=blocks,
        slot_mapping=(blocks[rows, positions.long() // 16] * 16 + positions % 16).int(),
        seq_lens_device=torch.tensor(lens, dtype=torch.int32),
        query_starts=torch.tensor([0, half, len(token_ids)], dtype=torch.int32),
    )
    return model.compute_logits(model(model.embed(token_ids), positions, kv_cache, metadata))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("folder", "size"), [("gqa_folder", 2), ("mha_folder", 2), ("mha_folder", 4)])
def test_a_sharded_checkpoint_gives_the_same_logits(
    folder: str, size: int, backend: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(folder)
    config = Qwen2AudioConfig.from_folder(path)
    token_ids = torch.randint(0, config.text.vocab_size, (41,), dtype=torch.int32)

    def of_rank(shard: Shard) -> Tensor:
        chosen, _ = select_backend(backend, CPU)
        model = load_model(path, config, chosen, torch.float32, CPU, shard=shard)
        assert hasattr(model, "audio_tower") == (shard.rank == 0)
        if backend == "cpu":
            prepare_for_cpu(model)
        return prefill(model, token_ids)

    (expected,) = on_ranks(1, of_rank)
    torch.testing.assert_close(on_ranks(size, of_rank)[0], expected, atol=1e-4, rtol=1e-4)


def test_ranks_round_their_own_columns_to_float8(mha_folder: Path) -> None:
    """As good as one rank's weights in float8, and not the same; a head's keys and values have one rank's scales."""
    config = Qwen2AudioConfig.from_folder(mha_folder)
    token_ids = torch.randint(0, config.text.vocab_size, (41,), dtype=torch.int32)

    def of_rank(shard: Shard, *, rounded: bool = True) -> tuple[Tensor, list[Tensor | None]]:
        backend, _ = select_backend("reference", CPU)
        model = load_model(mha_folder, config, backend, torch.bfloat16, CPU, shard=shard, fp8_kv=True)
        scales = [layer.self_attn.kv_scales for layer in model.decoder.layers]
        for layer in model.decoder.layers:
            layer.self_attn.kv_scales = None
        if rounded:
            round_to_fp8(model.decoder)
        return prefill(model, token_ids), scales

    ((exact, scales),) = on_ranks(1, lambda shard: of_rank(shard, rounded=False))
    ((alone, _),) = on_ranks(1, of_rank)
    (together, *_), of_ranks = zip(*on_ranks(2, of_rank), strict=True)
    for whole, *parts in zip(scales, *of_ranks, strict=True):
        assert torch.equal(torch.cat([part for part in parts if part is not None], dim=1), whole)
    error, of_two = ((logits - exact).norm() / exact.norm() for logits in (alone, together))
    assert error < 0.2
    assert 0 < of_two < 1.5 * error


class Recorder:
    """safetensors' file, noting which part of which tensor is read."""

    def __init__(self, file: Any, reads: dict[str, list[np.ndarray]]) -> None:
        self._file, self._reads = file, reads

    def __enter__(self) -> Recorder:
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def keys(self) -> Any:
        return self._file.keys()

    def get_tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        self._reads[name].append(np.ones(tensor.shape, dtype=int))
        return tensor

    def get_slice(self, name: str) -> Any:
        stored, reads = self._file.get_slice(name), self._reads[name]

        class Slice:
            get_shape = stored.get_shape

            def __getitem__(self, index: Any) -> Tensor:
                counts = np.zeros(stored.get_shape(), dtype=int)
                counts[index] = 1
                reads.append(counts)
                part: Tensor = stored[index]
                return part

        return Slice()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_ranks_read_each_value_once(size: int, mha_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Qwen2AudioConfig.from_folder(mha_folder)
    backend, _ = select_backend("reference", CPU)
    reads: dict[str, list[np.ndarray]] = defaultdict(list)
    original = model.weight_files.safe_open
    monkeypatch.setattr(model.weight_files, "safe_open", lambda *a, **k: Recorder(original(*a, **k), reads))
    table = name_table(config)
    for rank in range(size):
        shard = Shard(rank, size)
        load_model(mha_folder, config, backend, torch.float32, CPU, shard=shard)
    assert reads.keys() == table.keys()
    for name, target in table.items():
        is_copied = target.parameter.startswith("decoder.") and target.split is None  # the norms
        assert (sum(reads[name]) == (size if is_copied else 1)).all(), name
        assert len(reads[name]) == (size if target.parameter.startswith(("decoder.", "lm_head")) else 1), name


@pytest.mark.parametrize(
    ("what", "value"),
    [("num_attention_heads", 6), ("num_key_value_heads", 2), ("intermediate_size", 6), ("vocab_size", 1538)],
)
def test_what_does_not_divide_is_named(what: str, value: int) -> None:
    good = TextConfig(vocab_size=1536, hidden_size=64, intermediate_size=32, num_attention_heads=8,
                      num_key_value_heads=4, head_dim=8)  # fmt: skip
    assert Shard(3, 4).share(good).num_key_value_heads == 1
    changes = {what: value} | ({"num_key_value_heads": 2} if what == "num_attention_heads" else {})
    with pytest.raises(
        ConfigError, match=f"--tensor-parallel-size 4 does not divide the checkpoint's {what}, {value}"
    ):
        Shard(0, 4).share(replace(good, **changes))
