"""The kernels of this folder as an H200 would run them, at the sizes of the 7B model."""

from __future__ import annotations

import pytest
import torch

from model.triton_kernels import int4_matmul, round_rows
from tests.model.aot import MAX_SHARED_BYTES, compile_for_h200, record

K, N, GROUPS = 4096, 12288, 32


@pytest.mark.parametrize("width", [4096, 11008])
def test_rows_are_rounded_by_wide_loads_and_the_hardwares_cast(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = record(monkeypatch, round_rows, "_kernel")
    monkeypatch.setattr(round_rows, "reaches", lambda _: True)
    round_rows.round_rows(torch.empty(3, width, dtype=torch.bfloat16))
    code = compile_for_h200(launches[0])
    assert not code.spills
    assert code.count(r"LDG\.E\.128")
    assert code.count(r"STG\.E\.128")
    assert code.count("F2FP"), "a cast to float8"


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("groups", [GROUPS, 2 * GROUPS])
def test_four_bits_are_multiplied_by_tensor_cores_behind_asynchronous_loads(
    rows: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = record(monkeypatch, int4_matmul, "_matmul_kernel")
    monkeypatch.setattr(int4_matmul, "reaches", lambda _: True)
    words, zeros = torch.empty(K // 8, N, dtype=torch.int32), torch.empty(groups, N, dtype=torch.uint8)
    x = torch.empty(rows, K, dtype=torch.bfloat16)
    int4_matmul.int4_matmul(x, words, zeros, torch.empty(groups, N, dtype=torch.float16))
    (launch,) = launches
    columns, shares, row_tiles = launch.grid
    assert (columns, row_tiles) == (N // int4_matmul.OUTPUTS, 1)
    assert 1 < shares <= int4_matmul.PROGRAMS // columns
    code = compile_for_h200(launch)
    assert not code.spills
    assert code.shared_bytes < MAX_SHARED_BYTES / 3, "several programs of a multiprocessor hide each other's waits"
    assert code.count("HMMA|HGMMA")
    assert code.count("LDGSTS")


def test_many_rows_unpack_by_wide_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = record(monkeypatch, int4_matmul, "_dequantise_kernel")
    monkeypatch.setattr(int4_matmul, "reaches", lambda _: True)
    words, zeros = torch.empty(K // 8, N, dtype=torch.int32), torch.empty(GROUPS, N, dtype=torch.uint8)
    int4_matmul.dequantise(words, zeros, torch.empty(GROUPS, N, dtype=torch.float16), torch.bfloat16)
    code = compile_for_h200(launches[0])
    assert not code.spills
    assert code.count(r"LDG\.E\.128")
