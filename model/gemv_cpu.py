"""The product of one row with a weight that oneDNN has packed, on a CPU, compiled by numba.

oneDNN's own takes up to twice as long (docs/decisions.md). It keeps a weight [N, K] as [N / 64, K / v, 64, v], v
values to a word of 32 bits: 64 sums run side by side, and each word is read once. No interface promises that, so
`packed_blocks` believes it only where it finds the weight so. Sums are float32, rounded once, as oneDNN's are.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from model.compiled import REASSOCIATE, as_float32, compile_region, float_of_bits, narrow, pointer, take_next, widen

BLOCK = 64
"""Columns that are computed at once."""
UNROLLED = 8
"""Rows of a block that are read at once."""
WORD = 4
HIGH_HALF = -65536
ARGUMENTS = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("num_rows", "num_columns", "depth"),
            *("x", "weight", "bias", "residual", "sums", "out", "next_item"),
        )
    ]
)
"""Sizes M (here 1: several are for `gemm_cpu`), N and K, and addresses: of x, [M, K], of the blocks, of [N] or 0,
of [M, N] or 0, of float32 [M, N rounded up], of [M, N], and of a counter."""


def packed_blocks(packed: Tensor, weight: Tensor) -> int | None:
    """Where the blocks of a packed weight begin; None where they are not what the kernel reads.

    packed: what `mkldnn._reorder_linear_weight` made of `weight`, [N, K], float32 or bfloat16; to be kept.
    """
    num_columns, depth = weight.shape
    num_blocks = -(-num_columns // BLOCK)
    size = BLOCK * depth * weight.itemsize
    if depth % UNROLLED or torch.ops.mkldnn._nbytes(packed) != num_blocks * size:
        return None
    address: int = torch.ops.mkldnn.data_ptr(packed)
    for block in {0, num_blocks // 2, num_blocks - 1}:
        columns = weight[block * BLOCK : (block + 1) * BLOCK]
        expected = weight.new_zeros(BLOCK, depth)
        expected[: len(columns)] = columns
        found = torch.frombuffer((ctypes.c_char * size).from_address(address + block * size), dtype=weight.dtype)
        if not torch.equal(expected.view(BLOCK, -1, WORD // weight.itemsize).transpose(0, 1).flatten(), found):
            return None
    return address


@cache
def compile_gemv(is_bfloat16: bool) -> int:
    """-> address of a C function that takes a pointer to ARGUMENTS. Else everything is float32."""
    kind = np.int16 if is_bfloat16 else np.float32
    words_kind = np.int32 if is_bfloat16 else np.float32
    values_per_word = 2 if is_bfloat16 else 1

    @compile_region(ARGUMENTS)
    def region(arguments: Any) -> None:
        a = carray(arguments, 1)[0]
        num_words = a.depth // values_per_word * BLOCK
        x = carray(pointer(a.x), a.depth, kind)
        while True:
            first = take_next(a.next_item) * BLOCK
            if first >= a.num_columns:
                break
            words = carray(pointer(a.weight + WORD * first // BLOCK * num_words), num_words, words_kind)
            sums = carray(pointer(a.sums + 4 * first), BLOCK, np.float32)
            if is_bfloat16:
                _multiply_bfloat16(x, words, sums)
            else:
                _multiply_float32(x, words, sums)
            size = min(BLOCK, a.num_columns - first)
            width = a.num_columns
            if a.bias != 0:
                add_to(sums, carray(pointer(a.bias), width, kind)[first : first + size])
            if a.residual != 0:
                add_to(sums, carray(pointer(a.residual), width, kind)[first : first + size])
            out = carray(pointer(a.out), width, kind)[first : first + size]
            for i in range(size):
                out[i] = narrow(sums[i]) if is_bfloat16 else sums[i]

    return region


@njit(fastmath=REASSOCIATE, error_model="numpy")
def add_to(sums: Any, values: Any) -> None:
    """sums += values, float32 or bfloat16."""
    for i in range(values.shape[0]):
        sums[i] += as_float32(values[i])


@njit(fastmath=REASSOCIATE, error_model="numpy")
def _multiply_bfloat16(x: Any, words: Any, sums: Any) -> None:
    """sums[i] = x . column i. Two values to a word, the one of the lower row in its lower half."""
    sums[:] = 0
    for k in range(0, x.shape[0], UNROLLED):
        at = k // 2 * BLOCK
        rows_0, rows_2 = words[at : at + BLOCK], words[at + BLOCK : at + 2 * BLOCK]
        rows_4, rows_6 = words[at + 2 * BLOCK : at + 3 * BLOCK], words[at + 3 * BLOCK : at + 4 * BLOCK]
        x0, x1, x2, x3 = widen(x[k]), widen(x[k + 1]), widen(x[k + 2]), widen(x[k + 3])
        x4, x5, x6, x7 = widen(x[k + 4]), widen(x[k + 5]), widen(x[k + 6]), widen(x[k + 7])
        for i in range(BLOCK):
            total = sums[i] + x0 * float_of_bits(rows_0[i] << np.int32(16))
            total += x1 * float_of_bits(rows_0[i] & np.int32(HIGH_HALF))
            total += x2 * float_of_bits(rows_2[i] << np.int32(16))
            total += x3 * float_of_bits(rows_2[i] & np.int32(HIGH_HALF))
            total += x4 * float_of_bits(rows_4[i] << np.int32(16))
            total += x5 * float_of_bits(rows_4[i] & np.int32(HIGH_HALF))
            total += x6 * float_of_bits(rows_6[i] << np.int32(16))
            total += x7 * float_of_bits(rows_6[i] & np.int32(HIGH_HALF))
            sums[i] = total


@njit(fastmath=REASSOCIATE, error_model="numpy")
def _multiply_float32(x: Any, words: Any, sums: Any) -> None:
    """sums[i] = x . column i."""
    sums[:] = 0
    for k in range(0, x.shape[0], 4):
        at = k * BLOCK
        row_0, row_1 = words[at : at + BLOCK], words[at + BLOCK : at + 2 * BLOCK]
        row_2, row_3 = words[at + 2 * BLOCK : at + 3 * BLOCK], words[at + 3 * BLOCK : at + 4 * BLOCK]
        x0, x1, x2, x3 = x[k], x[k + 1], x[k + 2], x[k + 3]
        for i in range(BLOCK):
            sums[i] += x0 * row_0[i] + x1 * row_1[i] + x2 * row_2[i] + x3 * row_3[i]
