"""Kernels that numba keeps: whoever else compiles at the same time, a process runs its own."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numba import carray
from numba.core.caching import IndexDataCacheFile

from model.compiled import compile_region, parallel_region

ARGUMENTS = np.dtype([("answer", np.int64)])


def compile_answer(number: int) -> int:
    """One kernel of two variants, as bfloat16's and float32's are."""

    @compile_region(ARGUMENTS)
    def region(arguments: Any) -> None:
        carray(arguments, 1)[0].answer = number

    return region


def answer(address: int) -> int:
    region = parallel_region()
    assert region is not None
    written = ctypes.c_int64(0)
    region(address, ctypes.addressof(written), 1, 0)
    return written.value


def test_two_processes_that_compile_at_once_keep_each_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have read the index when it was empty, and the first writes its code last."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    save_data = IndexDataCacheFile._save_data
    others: list[int] = []

    def save_late(self: Any, name: str, data: Any) -> None:
        if not others:
            others.append(0)
            with monkeypatch.context() as patch:
                patch.setattr(IndexDataCacheFile, "_load_index", lambda _: {})
                others[0] = answer(compile_answer(2))
        save_data(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(IndexDataCacheFile, "_save_data", save_late)
        assert answer(compile_answer(1)) == 1
    assert others == [2]
    assert [answer(compile_answer(number)) for number in (1, 2)] == [1, 2]


def test_a_kept_kernel_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    compile_answer(3)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")}
    assert len(kept) == 2  # an index, and its only variant
    assert answer(compile_answer(3)) == 3
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")} == kept
