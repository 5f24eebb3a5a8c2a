"""The product of a few rows with oneDNN's packed weight, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.compiled import parallel_region
from model.gemm_cpu import DEPTH, MAX_ROWS, ROWS, can_run, compile_gemm
from model.gemv_cpu import ARGUMENTS, BLOCK, packed_blocks

pytestmark = pytest.mark.skipif(not can_run(), reason="this CPU does not multiply bfloat16")


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 17, MAX_ROWS])
@pytest.mark.parametrize(("num_columns", "depth"), [(BLOCK, 32), (200, 96), (130, 2 * DEPTH + 64)])
@pytest.mark.parametrize("epilogue", [False, True])
def test_products_are_right_and_nothing_else_is_written(
    num_rows: int, num_columns: int, depth: int, epilogue: bool
) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    rounded_up = -(-num_rows // ROWS) * ROWS
    weight, bias, residual = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((num_columns, depth), (num_columns,), (num_rows, num_columns))
    )
    x = torch.full((rounded_up, depth), float("nan")).bfloat16()
    x[:num_rows] = torch.randn(num_rows, depth, generator=generator)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    blocks = packed_blocks(packed, weight)
    out = torch.full((num_rows + 1, num_columns), 7.0).bfloat16()
    sums = torch.empty(rounded_up * -(-num_columns // BLOCK) * BLOCK)
    counter = np.zeros(1, np.int64)
    arguments = np.zeros(1, ARGUMENTS)
    added = (bias.data_ptr(), residual.data_ptr()) if epilogue else (0, 0)
    arguments[0] = (
        *(num_rows, num_columns, depth, x.data_ptr(), blocks, *added),
        *(sums.data_ptr(), out.data_ptr(), counter.ctypes.data),
    )
    region = parallel_region()
    assert region is not None
    region(compile_gemm(), arguments.ctypes.data, 2, 0)
    exact = x[:num_rows].double() @ weight.double().T
    if epilogue:
        exact += bias.double() + residual.double()
    torch.testing.assert_close(out[:num_rows].double(), exact, rtol=2**-8, atol=1e-3 * depth**0.5)
    assert (out[num_rows:] == 7).all()
