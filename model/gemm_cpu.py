"""The product of a few bfloat16 rows with a weight that oneDNN has packed, on a CPU that multiplies bfloat16.

Of `gemv_cpu`'s layout: a word of 32 bits is two values of a column, and AVX512-BF16's `vdpbf16ps` multiplies sixteen
words with one word of a row and adds to sixteen sums. ROWS rows share each load of a weight; of more rows, each
ROWS read the block again, from the cache. Sums are float32, rounded once, as oneDNN's are.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from model.compiled import REASSOCIATE, compile_region, narrow, pointer, take_next
from model.gemv_cpu import ARGUMENTS, BLOCK, WORD, add_to

MAX_ROWS = 32
"""With more, oneDNN's is as fast (docs/decisions.md)."""
ROWS = 4
"""Multiplied at once: as many as leave their sums in registers."""
DEPTH = 1024
"""Of a block, read by all rows before the next: what stays in the second cache meanwhile."""
LANES = 16
"""Sums in a register."""


def can_run() -> bool:
    """Whether this CPU has the instruction, and the compiler knows."""
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512bf16"))


@cache
def compile_gemm() -> int:
    """-> address of a C function that takes a pointer to `gemv_cpu.ARGUMENTS`.

    x has rows to a multiple of ROWS, and the sums have room for as many; the last may hold anything.
    """

    @compile_region(ARGUMENTS)
    def region(arguments: Any) -> None:
        a = carray(arguments, 1)[0]
        num_rows, width, depth = a.num_rows, a.num_columns, a.depth
        rounded_up = -(-num_rows // ROWS) * ROWS
        while True:
            first = take_next(a.next_item) * BLOCK
            if first >= width:
                break
            size = min(BLOCK, width - first)
            sums_at = a.sums + 4 * first * rounded_up
            sums = carray(pointer(sums_at), (rounded_up, BLOCK), np.float32)
            sums[:] = 0
            for k in range(0, depth, DEPTH):
                block = a.weight + 2 * (first * depth + k * BLOCK)
                num_words = min(DEPTH, depth - k) // 2
                multiply(num_rows, a.x + 2 * k, 2 * depth, block, num_words, sums_at, 4 * BLOCK)
            for row in range(num_rows):
                start = row * width + first
                if a.bias != 0:
                    add_to(sums[row, :size], carray(pointer(a.bias + 2 * first), size, np.int16))
                if a.residual != 0:
                    add_to(sums[row, :size], carray(pointer(a.residual + 2 * start), size, np.int16))
                _narrow(sums[row, :size], carray(pointer(a.out + 2 * start), size, np.int16))

    return region


@njit(fastmath=REASSOCIATE, error_model="numpy")
def _narrow(sums: Any, out: Any) -> None:
    for i in range(out.shape[0]):
        out[i] = narrow(sums[i])


@njit(error_model="numpy")
def multiply(
    num_rows: int, x: int, row_bytes: int, block: int, num_words: int, sums: int, sums_row_bytes: int
) -> None:
    """sums += x times the BLOCK columns of a block. Addresses, and bytes from row to row.

    Rows of x and of the sums to a multiple of ROWS are read and written, whatever they hold.
    """
    for row in range(0, num_rows, ROWS):
        target = sums + row * sums_row_bytes
        _multiply_rows(x + row * row_bytes, row_bytes, block, num_words, target, sums_row_bytes)


class BFloat16(ir.types.Type):  # type: ignore[misc]
    """The type by its name: llvmlite has none for it."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat16)

    def __hash__(self) -> int:
        return hash(BFloat16)


@intrinsic
def _multiply_rows(
    _typing: Any, _x: Any, _row_bytes: Any, _block: Any, _num_words: Any, _sums: Any, _sums_row_bytes: Any
) -> Any:
    """`multiply` for ROWS rows; all int64."""
    word = ir.IntType(32)
    lanes, words = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(word, LANES)
    pairs = ir.VectorType(BFloat16(), 2 * LANES)
    per_row = BLOCK // LANES

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        x, row_bytes, block, num_words, sums, sums_row_bytes = arguments

        def after(start: Any, size: Any, times: Any, kind: Any) -> Any:
            """The address that many sizes on, as a pointer."""
            size, times = (
                value if isinstance(value, ir.Value) else ir.IntType(64)(value) for value in (size, times)
            )
            return builder.inttoptr(builder.add(start, builder.mul(size, times)), kind.as_pointer())

        kind = ir.FunctionType(lanes, [lanes, pairs, pairs])
        dot = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
        rows_of_sums = [
            builder.ptrtoint(after(sums, sums_row_bytes, row, word), ir.IntType(64)) for row in range(ROWS)
        ]
        places = [after(start, WORD * LANES, i, lanes) for start in rows_of_sums for i in range(per_row)]
        totals = [cgutils.alloca_once(builder, lanes) for _ in places]
        for total, place in zip(totals, places, strict=True):
            builder.store(builder.load(place, align=WORD), total)
        starts = [builder.ptrtoint(after(x, row_bytes, row, word), ir.IntType(64)) for row in range(ROWS)]
        with cgutils.for_range(builder, num_words) as loop:
            first = builder.add(block, builder.mul(loop.index, ir.IntType(64)(WORD * BLOCK)))
            columns = [
                builder.bitcast(builder.load(after(first, WORD * LANES, i, words), align=WORD), pairs)
                for i in range(per_row)
            ]
            for row, start in enumerate(starts):
                given = builder.load(after(start, WORD, loop.index, word))
                one = builder.insert_element(ir.Constant(words, ir.Undefined), given, word(0))
                spread = builder.bitcast(builder.shuffle_vector(one, one, ir.Constant(words, [0] * LANES)), pairs)
                for total, column in zip(totals[row * per_row : (row + 1) * per_row], columns, strict=True):
                    builder.store(builder.call(dot, [builder.load(total), column, spread]), total)
        for total, place in zip(totals, places, strict=True):
            builder.store(builder.load(total), place, align=WORD)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen
