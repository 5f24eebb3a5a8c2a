"""The backends over FlashAttention: what they hand to it, and what comes of it.

On a CPU by functions that check what the real ones would refuse or misread (`fake_flash`); on a GPU, by `-m gpu`, by
those that are installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from model.attention import AttentionBackend, AttentionMetadata, EncoderMetadata, select_backend
from model.attention.flash import FlashBackend
from model.attention.flash_attn import FlashAttentionBackend
from model.attention.flash_attn_3 import MAX_PARTIAL_ROWS, MAX_SPLITS, FlashAttention3Backend
from model.attention.select import PAGING_TORCH
from model.attention.torch_varlen import TorchVarlenBackend
from model.errors import ConfigError
from tests.model.attention_cases import (
    CASES,
    HEADS,
    LONG_CASES,
    PADDED_CASES,
    Case,
    D,
    decode,
    dense,
    expected,
    make_step,
)
from tests.model.fake_flash import FlashError, fake_flash_attn, fake_flash_attn_3, fake_varlen_attn

MAKERS: dict[str, Callable[[], FlashBackend]] = {
    "flash_attn": lambda: FlashAttentionBackend(fake_flash_attn()),
    "flash_attn_3": lambda: FlashAttention3Backend(fake_flash_attn_3()),
    "flash_attn_3, older": lambda: FlashAttention3Backend(fake_flash_attn_3(with_lse=True)),
    "torch_varlen": TorchVarlenBackend,
}
EDGES = [
    Case("decodes around an edge of 256", ((1, 255), (1, 256), (1, 257), (1, 1))),
    Case("prompts around an edge of 256", ((1, 300), (255, 255), (2, 257))),
    Case("chunks on an edge of 256", ((256, 512), (3, 256), (40, 100))),
]


@pytest.fixture(params=MAKERS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FlashBackend:
    """One that calls functions which check."""
    monkeypatch.setattr(varlen, "varlen_attn", fake_varlen_attn)
    return MAKERS[request.param]()


def half_step(
    case: Case, heads: tuple[int, int], stale: float, backend: AttentionBackend, **options: Any
) -> tuple[list[Tensor], AttentionMetadata, Tensor]:
    """-> (query, key, value, cache) in half precision, the metadata, and what shall come of them."""
    options = {"dtype": torch.float16, "block_size": backend.block_sizes[0], **options}
    *step, everything, metadata = make_step(case, heads, stale, **options)
    return step, metadata, expected(step[0], everything, metadata)


def close(out: Tensor, judged: Tensor) -> None:
    """As near as one rounding to half precision leaves it."""
    torch.testing.assert_close(out.double(), judged, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("stale", [0.0, float("nan")])
@pytest.mark.parametrize("case", [*CASES, *EDGES, *PADDED_CASES], ids=str)
def test_a_step_equals_dense_attention(
    case: Case, heads: tuple[int, int], stale: float, backend: FlashBackend
) -> None:
    step, metadata, judged = half_step(case, heads, stale, backend)
    close(decode(backend, *step, metadata), judged)


@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_long_sequences(case: Case, backend: FlashBackend) -> None:
    step, metadata, judged = half_step(case, (4, 2), float("nan"), backend)
    close(decode(backend, *step, metadata), judged)


def test_a_step_in_bfloat16(backend: FlashBackend) -> None:
    step, metadata, judged = half_step(CASES[-1], (4, 2), 0.0, backend, dtype=torch.bfloat16)
    out = decode(backend, *step, metadata)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), judged, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("case", [CASES[4], CASES[-1], *EDGES], ids=str)
def test_a_step_writes_its_keys_and_values_and_nothing_else(case: Case, backend: FlashBackend) -> None:
    (query, key, value, cache), metadata, _ = half_step(case, (4, 2), 7.0, backend)
    written = cache.clone()
    slots = written.flatten(1, 2)
    slots[0, metadata.slot_mapping], slots[1, metadata.slot_mapping] = key, value
    decode(backend, query, key, value, cache, metadata)
    assert torch.equal(cache, written)


def test_queries_and_keys_are_turned_before(backend: FlashBackend) -> None:
    """A rotation of both by one angle changes no score; of the keys in the cache, it changes what is stored."""
    (query, key, value, cache), metadata, judged = half_step(Case("prompt", ((20, 20),)), (4, 2), 0.0, backend)
    angle = torch.full((20, 1, D // 2), 0.7)
    out = backend.decode(
        torch.cat((query, key, value), dim=1), angle.cos().half(), angle.sin().half(), cache, metadata
    )
    torch.testing.assert_close(out.double(), judged, atol=5e-3, rtol=5e-3)
    stored = cache.flatten(1, 2)[:, metadata.slot_mapping]
    assert torch.equal(stored[1], value)
    assert not torch.allclose(stored[0], key, atol=0.1)


def test_rows_that_fill_up_a_batch_give_zeros_and_write_nothing(backend: FlashBackend) -> None:
    """As a CUDA graph has them; the block table is as wide as the longest context there."""
    (query, key, value, cache), metadata, judged = half_step(CASES[4], (4, 2), 3.0, backend)
    num_rows, padding = query.shape[0], 3
    wide = torch.zeros(num_rows + padding, 2 * metadata.block_table.shape[1] + 1, dtype=torch.int32)
    wide[:num_rows, : metadata.block_table.shape[1]] = metadata.block_table
    lens = torch.tensor([*metadata.seq_lens, *[0] * padding], dtype=torch.int32)
    padded = replace(
        metadata,
        query_lens=(1,) * (num_rows + padding),
        seq_lens=(wide.shape[1] * backend.block_sizes[0],) * (num_rows + padding),
        num_decodes=num_rows + padding,
        first_blocks=(None,) * (num_rows + padding),
        block_table=wide,
        slot_mapping=torch.cat((metadata.slot_mapping, torch.full((padding,), -1, dtype=torch.int32))),
        seq_lens_device=lens,
        query_starts=torch.arange(num_rows + padding + 1, dtype=torch.int32),
    )
    written = cache.clone()
    decode(backend, query, key, value, written, metadata)
    filled = [torch.cat((x, x.new_full((padding, *x.shape[1:]), float("nan")))) for x in (query, key, value)]
    out = decode(backend, *filled, cache, padded)
    close(out[:num_rows], judged)
    assert not out[num_rows:].any()
    assert torch.equal(cache, written)


@pytest.mark.parametrize("given", [False, True], ids=["lengths on the host", "starts on the device"])
def test_encoder_attention_stays_within_each_clip(given: bool, backend: FlashBackend) -> None:
    for lens in ((1, 37, 2, 16), (1500,), (1, 37)):
        packed = torch.randn(sum(lens), 3 * 4 * D, generator=torch.Generator().manual_seed(0)).half()
        query, key, value = (x.unflatten(-1, (4, D)) for x in packed.chunk(3, dim=-1))  # as the encoder has them
        starts = torch.tensor([0, *lens]).cumsum(0, dtype=torch.int32) if given else None
        metadata = EncoderMetadata(tuple(2 * length for length in lens) if given else lens, starts)
        out = backend.encode(query, key, value, metadata)
        parts = zip(*(x.split(list(lens)) for x in (query, key, value)), strict=True)
        close(out, torch.cat([dense(q, k, v, causal=False) for q, k, v in parts]))


def test_flash_attn_2_splits_decodes_and_tiles_chunks() -> None:
    package = fake_flash_attn()
    backend = FlashAttentionBackend(package)
    for case in (CASES[4], CASES[8], CASES[-1]):
        step, metadata, _ = half_step(case, (4, 2), 0.0, backend)
        decode(backend, *step, metadata)
    decodes, chunks = "flash_attn_with_kvcache", "flash_attn_varlen_func"
    assert package.calls.names == [decodes, chunks, decodes, chunks]
    assert [call["q"].shape[0] for call in package.calls.arguments] == [6, 47, 3, 42]


def test_flash_attn_3_attends_for_a_step_at_once_and_bounds_what_it_splits() -> None:
    package = fake_flash_attn_3()
    backend = FlashAttention3Backend(package)
    for case in (CASES[0], CASES[-1], Case("prompt", ((2 * MAX_PARTIAL_ROWS // 3, 2 * MAX_PARTIAL_ROWS // 3),))):
        step, metadata, _ = half_step(replace(case, rows=case.rows), (4, 2), 0.0, backend)
        decode(backend, *step, metadata)
    assert [call["num_splits"] for call in package.calls.arguments] == [MAX_SPLITS, MAX_SPLITS, 1]


def test_lengths_are_brought_to_the_device_once_for_all_layers() -> None:
    package = fake_flash_attn()
    backend = FlashAttentionBackend(package)
    mixed, prompt = (half_step(case, (4, 2), 0.0, backend) for case in (CASES[-1], CASES[-2]))
    for step, metadata, judged in (mixed, mixed, prompt, mixed):
        close(decode(backend, *step, metadata), judged)
    chunks = [call for call in package.calls.arguments if "cu_seqlens_k" in call]
    for starts in ("cu_seqlens_q", "cu_seqlens_k"):
        first, second, third, fourth = (call[starts].data_ptr() for call in chunks)
        assert first == second
        assert first != third != fourth


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda q, cache, table, lens: (q.float(), cache.float(), table, lens), "fp16 and bf16"),
        (lambda q, cache, table, lens: (q, cache, table.long(), lens), "int32"),
        (lambda q, cache, table, lens: (q, cache, table, lens.long()), "int32"),
        (lambda q, cache, table, lens: (q, cache.view(2, -1, 16, 2, D), table, lens), "divisible by 256"),
        (lambda q, cache, table, lens: (q, cache, table + 1000, lens), "not there"),
        (lambda q, cache, table, lens: (q, cache, table, lens + 256), "longer than"),
        (lambda q, cache, table, lens: (q[..., :4], cache[..., :4], table, lens), "head dim"),
        (lambda q, cache, table, lens: (q.mT.contiguous().mT, cache, table, lens), "contiguous last"),
    ],
)
def test_what_the_real_functions_refuse_is_noticed(spoil: Callable[..., tuple[Tensor, ...]], said: str) -> None:
    """The tests above rest on it."""
    package = fake_flash_attn()
    (query, _, _, cache), metadata, _ = half_step(CASES[4], (4, 2), 0.0, FlashAttentionBackend(package))
    q, paged, table, lens = spoil(query[:, None], cache, metadata.block_table, metadata.seq_lens_device)
    with pytest.raises(FlashError, match=said):
        package.flash_attn_with_kvcache(q, *paged, cache_seqlens=lens, block_table=table, causal=True)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < PAGING_TORCH, reason="this torch has no paging: refused"
)
def test_torch_takes_what_it_is_given() -> None:
    """Its own function, on tensors without contents: names, kinds and shapes are right."""
    assert (
        inspect.signature(varlen.varlen_attn).parameters.keys()
        == inspect.signature(fake_varlen_attn).parameters.keys()
    )
    (query, _, _, cache), metadata, _ = half_step(CASES[-1], (4, 2), 0.0, TorchVarlenBackend())
    on_meta = {
        name: getattr(metadata, name).to("meta")
        for name in ("block_table", "slot_mapping", "seq_lens_device", "query_starts")
    }
    backend, heads = TorchVarlenBackend(), query.to("meta")
    out = backend._attend(heads, *cache.to("meta"), replace(metadata, **on_meta))
    assert (out.shape, out.dtype, out.device.type) == (query.shape, query.dtype, "meta")
    clips = EncoderMetadata((20, 34), torch.empty(3, dtype=torch.int32, device="meta"))
    assert backend.encode(heads, heads, heads, clips).shape == heads.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["flash_attn", "torch_varlen"])
@pytest.mark.parametrize("heads", [(32, 32), (8, 2)], ids=str)
@pytest.mark.parametrize("case", [*CASES, *EDGES, *PADDED_CASES, *LONG_CASES], ids=str)
def test_a_step_on_a_gpu(case: Case, heads: tuple[int, int], name: str) -> None:
    """By the real functions, those that are installed: skipped with the sentence that an operator would read."""
    device = torch.device("cuda")
    backend = installed(name, device)
    step, metadata, judged = half_step(
        case, heads, float("nan"), backend, dtype=torch.bfloat16, head_dim=128, device=device
    )
    out = decode(backend, *step, metadata)
    torch.testing.assert_close(out.double(), judged, atol=0.02, rtol=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["flash_attn", "torch_varlen"])
def test_clips_on_a_gpu(name: str) -> None:
    device, lens = torch.device("cuda"), (1, 37, 1500, 2, 16)
    backend = installed(name, device)
    packed = torch.randn(sum(lens), 3 * 20 * 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    query, key, value = (x.unflatten(-1, (20, 64)) for x in packed.chunk(3, dim=-1))
    out = backend.encode(
        *(x.unflatten(-1, (20, 64)) for x in packed.to(device).chunk(3, dim=-1)), EncoderMetadata(lens)
    )
    parts = zip(*(x.split(list(lens)) for x in (query, key, value)), strict=True)
    judged = torch.cat([dense(q, k, v, causal=False) for q, k, v in parts])
    torch.testing.assert_close(out.double().cpu(), judged, atol=0.02, rtol=0.02)


def installed(name: str, device: torch.device) -> AttentionBackend:
    try:
        return select_backend(name, device, dtype=torch.bfloat16, head_dims=(128, 64))[0]
    except ConfigError as problem:
        pytest.skip(str(problem))
