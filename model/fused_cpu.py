"""Row-wise layers in one pass over memory on a CPU, compiled by numba. RMSNorm of bfloat16 takes torch eight.

Roundings are those of the reference, operator by operator. `rms_norm` and `swiglu` take bfloat16: torch has as
good for float32, and only `one_token_cpu` takes that from here.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from model.compiled import (
    as_float32,
    compile_region,
    exp2,
    narrow,
    parallel_region,
    pointer,
    structure,
    take_next,
    widen,
)

ARGUMENTS = np.dtype(
    [
        *((name, np.int64) for name in ("num_rows", "width", "x", "weight", "out", "next_item")),
        ("eps", np.float32),
    ],
    align=True,
)
_Arguments = structure(ARGUMENTS)
ROWS = 8
"""Of an item of work."""
MINUS_LOG2_E = -1.4426950408889634


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Statistics in float32, rounded, then times the weight. x: [T, C], weight: [C] -> [T, C]."""
    x = x.contiguous()
    return _run(compile_rms_norm(is_bfloat16=True), x, torch.empty_like(x), weight.data_ptr(), eps)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up. x: [T, 2 C], the gates first -> [T, C]."""
    x = x.contiguous()
    return _run(compile_swiglu(is_bfloat16=True), x, x.new_empty(x.shape[0], x.shape[1] // 2))


def _run(kernel: int, x: Tensor, out: Tensor, weight: int = 0, eps: float = 0.0) -> Tensor:
    num_rows, width = out.shape
    counter = ctypes.c_int64(0)
    arguments = _Arguments(num_rows, width, x.data_ptr(), weight, out.data_ptr(), ctypes.addressof(counter), eps)
    region = parallel_region()
    assert region is not None, "installed only where torch has this runtime"
    region(kernel, ctypes.addressof(arguments), min(torch.get_num_threads(), -(-num_rows // ROWS)), 0)
    return out


@cache
def compile_rms_norm(is_bfloat16: bool) -> int:
    """-> address of a C function that takes a pointer to ARGUMENTS. Else everything is float32."""
    kind = np.int16 if is_bfloat16 else np.float32

    @compile_region(ARGUMENTS)
    def region(arguments: Any) -> None:
        a = carray(arguments, 1)[0]
        x = carray(pointer(a.x), (a.num_rows, a.width), kind)
        out = carray(pointer(a.out), (a.num_rows, a.width), kind)
        weight = carray(pointer(a.weight), a.width, kind)
        while True:
            first = take_next(a.next_item) * ROWS
            if first >= a.num_rows:
                break
            for row in range(first, min(first + ROWS, a.num_rows)):
                total = np.float32(0)
                for i in range(a.width):
                    value = as_float32(x[row, i])
                    total += value * value
                scale = np.float32(1) / np.sqrt(total / np.float32(a.width) + a.eps)
                for i in range(a.width):
                    normal = as_float32(x[row, i]) * scale
                    if is_bfloat16:
                        out[row, i] = narrow(as_float32(weight[i]) * widen(narrow(normal)))
                    else:
                        out[row, i] = as_float32(weight[i]) * normal

    return region


@cache
def compile_swiglu(is_bfloat16: bool) -> int:
    """-> address of a C function that takes a pointer to ARGUMENTS. Else everything is float32."""
    kind = np.int16 if is_bfloat16 else np.float32

    @compile_region(ARGUMENTS)
    def region(arguments: Any) -> None:
        a = carray(arguments, 1)[0]
        width = a.width  # read once: a loop that stores cannot be vectorised if it reads its own bounds again
        x = carray(pointer(a.x), (a.num_rows, 2 * width), kind)
        out = carray(pointer(a.out), (a.num_rows, width), kind)
        while True:
            first = take_next(a.next_item) * ROWS
            if first >= a.num_rows:
                break
            for row in range(first, min(first + ROWS, a.num_rows)):
                for i in range(width):
                    gate = as_float32(x[row, i])
                    silu = gate / (np.float32(1) + exp2(gate * np.float32(MINUS_LOG2_E)))
                    up = as_float32(x[row, width + i])
                    out[row, i] = narrow(widen(narrow(silu)) * up) if is_bfloat16 else silu * up

    return region
