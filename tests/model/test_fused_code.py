"""The fused kernels' machine code for an H200, compiled where none is, as the published model launches them."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from model.triton_kernels import add_rms_norm, rotate_and_write, sampling, swiglu, top_p
from tests.model.aot import MAX_SHARED_BYTES, MachineCode, compile_for_h200, record

V = 156_032
WIDTH, INNER, HEADS, HEAD_DIM = 4096, 11008, 32, 128
"""Of Qwen2-Audio-7B."""


def compiled(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, call: Callable[[], object]
) -> MachineCode:
    """The kernel that a call launches, which must keep all in registers."""
    launches = record(monkeypatch, module, name)
    call()
    code = compile_for_h200(launches[0])
    assert not code.spills
    assert code.shared_bytes < MAX_SHARED_BYTES
    return code


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_rotate_and_write(cache_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = torch.zeros(2, 3 * HEADS, HEAD_DIM, dtype=torch.bfloat16)
    angle = torch.zeros(2, 1, HEAD_DIM // 2, dtype=torch.bfloat16)
    cache = torch.zeros(2, 3, 16, HEADS, HEAD_DIM).to(cache_dtype)
    slots = torch.zeros(2, dtype=torch.int32)
    scales = torch.ones(2, HEADS) if cache_dtype.itemsize == 1 else None
    monkeypatch.setattr(rotate_and_write, "reaches", lambda tensor: True)
    code = compiled(
        monkeypatch,
        rotate_and_write,
        "_kernel",
        lambda: rotate_and_write.rotate_and_write(heads, angle, angle, cache, slots, scales),
    )
    assert code.count(r"LDG\.E\.128") >= 4, "two halves of queries or keys, and of values"
    stores = code.count(r"STG\.E\.128"), code.count(r"STG\.E\.64")
    assert stores == ((6, 0) if scales is None else (2, 4)), "8 values a thread: 16 bytes, 8 in e4m3"
    assert code.registers <= 64


def test_add_rms_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.zeros(2, WIDTH, dtype=torch.bfloat16), torch.zeros(WIDTH, dtype=torch.bfloat16)
    code = compiled(monkeypatch, add_rms_norm, "_kernel", lambda: add_rms_norm.add_rms_norm(x, x, weight, 1e-5))
    assert (code.count(r"LDG\.E\.128"), code.count(r"STG\.E\.128")) == (3, 2), "each row is read and written once"
    assert code.registers <= 64


def test_swiglu(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 2 * INNER, dtype=torch.bfloat16)
    code = compiled(monkeypatch, swiglu, "_kernel", lambda: swiglu.swiglu(x))
    assert (code.count(r"LDG\.E\.128"), code.count(r"STG\.E\.128")) == (2, 1)


@pytest.mark.parametrize(
    ("name", "has_top_p"),
    [
        *(("_best_of_chunks", False), ("_draw_of_chunks", False), ("_draw_of_chunks", True), ("_narrow", True)),
        ("_best_of_rows", False),
    ],
)
def test_sampling(name: str, has_top_p: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, ones, zeros = torch.zeros(2, V), torch.ones(2), torch.zeros(2, dtype=torch.int64)
    launches = {
        kernel: record(monkeypatch, where, kernel)
        for where, kernel in (
            (sampling, "_best_of_chunks"),
            (sampling, "_draw_of_chunks"),
            (sampling, "_best_of_rows"),
            (top_p, "_narrow"),
        )
    }
    sampling.best_tokens(logits)
    kept = ones if has_top_p else None
    sampling.sample_tokens(logits, zeros, ones, ones, kept, zeros, zeros, ones, zeros)
    assert len(launches["_narrow"]) == (top_p.NUM_PASSES if has_top_p else 0)
    for launch in launches[name][: 2 if name == "_best_of_rows" else 1]:  # of the best tokens, and of samples
        code = compile_for_h200(launch)
        assert not code.spills
        assert name == "_best_of_rows" or code.count(r"LDG\.E\.128") >= 1, "logits are read 16 bytes at a time"
        assert code.registers <= 168, "three programs of four warps on a multiprocessor"
