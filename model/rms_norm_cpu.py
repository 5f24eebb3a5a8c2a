"""RMSNorm in one pass over memory on a CPU, compiled by numba: torch makes eight passes of it."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from model.compiled import compile_region, narrow, parallel_region, pointer, take_next, widen

ARGUMENTS = np.dtype(
    [
        *((name, np.int64) for name in ("num_rows", "width", "x", "weight", "out", "next_item")),
        ("eps", np.float32),
    ],
    align=True,
)
ROWS = 8
"""Of an item of work."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Statistics in float32, rounded, then times the weight. x: bfloat16 [T, C], weight: bfloat16 [C] -> [T, C]."""
    x = x.contiguous()
    out = torch.empty_like(x)
    num_rows, width = x.shape
    counter = np.zeros(1, dtype=np.int64)
    arguments = np.zeros(1, dtype=ARGUMENTS)
    arguments[0] = num_rows, width, x.data_ptr(), weight.data_ptr(), out.data_ptr(), counter.ctypes.data, eps
    num_threads = min(torch.get_num_threads(), -(-num_rows // ROWS))
    region = parallel_region()
    assert region is not None, "installed only where torch has this runtime"
    region(_compile(), arguments.ctypes.data, num_threads, 0)
    return out


@cache
def _compile() -> int:
    """-> address of a C function that takes a pointer to ARGUMENTS."""

    @compile_region(ARGUMENTS)
    def region(arguments: Any) -> None:
        a = carray(arguments, 1)[0]
        x = carray(pointer(a.x), (a.num_rows, a.width), np.int16)
        out = carray(pointer(a.out), (a.num_rows, a.width), np.int16)
        weight = carray(pointer(a.weight), a.width, np.int16)
        while True:
            first = take_next(a.next_item) * ROWS
            if first >= a.num_rows:
                break
            for row in range(first, min(first + ROWS, a.num_rows)):
                total = np.float32(0)
                for i in range(a.width):
                    value = widen(x[row, i])
                    total += value * value
                scale = np.float32(1) / np.sqrt(total / np.float32(a.width) + a.eps)
                for i in range(a.width):
                    normal = widen(narrow(widen(x[row, i]) * scale))
                    out[row, i] = narrow(widen(weight[i]) * normal)

    return region
