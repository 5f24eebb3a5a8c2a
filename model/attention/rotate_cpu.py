"""Rotary positions and the write to the paged cache in one pass on a CPU, compiled by numba. torch takes ten.

Roundings are those of the reference, operator by operator.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from model.compiled import REASSOCIATE, compile_region, narrow, parallel_region, pointer, structure, take_next, widen

ARGUMENTS = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("num_tokens", "num_heads", "num_kv_heads", "half", "num_slots"),
            *("heads", "cos", "sin", "slot_mapping", "turned", "kv_layer", "next_item"),
        )
    ]
)
_Arguments = structure(ARGUMENTS)
ROWS = 8
"""Tokens of an item of work."""


def rotate_and_write(heads: Tensor, cos: Tensor, sin: Tensor, kv_layer: Tensor, slot_mapping: Tensor) -> Tensor:
    """heads: [T, H + 2 Hkv, D]; cos, sin: [T, 1, D / 2]; kv_layer: [2, N, P, Hkv, D], all of one dtype.

    -> the queries and keys, turned: [T, H + Hkv, D].
    """
    heads, cos, sin = heads.contiguous(), cos.contiguous(), sin.contiguous()
    num_tokens, num_rows, head_dim = heads.shape
    num_kv_heads = kv_layer.shape[3]
    turned = heads.new_empty(num_tokens, num_rows - num_kv_heads, head_dim)
    counter = ctypes.c_int64(0)
    arguments = _Arguments(
        *(num_tokens, num_rows - 2 * num_kv_heads, num_kv_heads, head_dim // 2, kv_layer[0].numel()),
        *(heads.data_ptr(), cos.data_ptr(), sin.data_ptr(), slot_mapping.data_ptr(), turned.data_ptr()),
        *(kv_layer.data_ptr(), ctypes.addressof(counter)),
    )
    region = parallel_region()
    assert region is not None, "the backend is chosen only where torch has this runtime"
    kernel = compile_rotation(heads.dtype == torch.bfloat16)
    region(kernel, ctypes.addressof(arguments), min(torch.get_num_threads(), -(-num_tokens // ROWS)), 0)
    return turned


@cache
def compile_rotation(is_bfloat16: bool) -> int:
    """-> address of a C function that takes a pointer to ARGUMENTS. Else everything is float32."""
    kind = np.int16 if is_bfloat16 else np.float32

    @compile_region(ARGUMENTS)
    def region(arguments: Any) -> None:
        a = carray(arguments, 1)[0]
        half, width, kv_width = a.half, 2 * a.half, 2 * a.half * a.num_kv_heads
        num_turned = a.num_heads + a.num_kv_heads
        row_width = (num_turned + a.num_kv_heads) * width
        heads = carray(pointer(a.heads), a.num_tokens * row_width, kind)
        turned = carray(pointer(a.turned), a.num_tokens * num_turned * width, kind)
        cos = carray(pointer(a.cos), a.num_tokens * half, kind)
        sin = carray(pointer(a.sin), a.num_tokens * half, kind)
        slot_mapping = carray(pointer(a.slot_mapping), a.num_tokens, np.int32)
        keys_values = carray(pointer(a.kv_layer), (2, a.num_slots), kind)
        while True:
            first = take_next(a.next_item) * ROWS
            if first >= a.num_tokens:
                break
            for token in range(first, min(first + ROWS, a.num_tokens)):
                c, s = cos[token * half : (token + 1) * half], sin[token * half : (token + 1) * half]
                for head in range(num_turned):
                    source, target = token * row_width + head * width, (token * num_turned + head) * width
                    x, y = heads[source : source + half], heads[source + half : source + width]
                    low, high = turned[target : target + half], turned[target + half : target + width]
                    if is_bfloat16:
                        _turn_bfloat16(x, c, y, s, np.float32(-1), low)
                        _turn_bfloat16(y, c, x, s, np.float32(1), high)
                    else:
                        _turn_float32(x, c, y, s, np.float32(-1), low)
                        _turn_float32(y, c, x, s, np.float32(1), high)
                slot = np.int64(slot_mapping[token]) * kv_width
                key = (token * num_turned + a.num_heads) * width
                value = token * row_width + num_turned * width
                keys_values[0, slot : slot + kv_width] = turned[key : key + kv_width]
                keys_values[1, slot : slot + kv_width] = heads[value : value + kv_width]

    return region


@njit(fastmath=REASSOCIATE)
def _turn_bfloat16(x: Any, cos: Any, y: Any, sin: Any, sign: Any, out: Any) -> None:
    """out = x cos + sign y sin. A half of a head at a time: for both, too many arrays might overlap to vectorise."""
    for i in range(out.shape[0]):
        left = widen(narrow(widen(x[i]) * widen(cos[i])))
        right = widen(narrow(widen(y[i]) * widen(sin[i])))
        out[i] = narrow(left + sign * right)


@njit(fastmath=REASSOCIATE)
def _turn_float32(x: Any, cos: Any, y: Any, sin: Any, sign: Any, out: Any) -> None:
    """out = x cos + sign y sin."""
    for i in range(out.shape[0]):
        out[i] = x[i] * cos[i] + sign * (y[i] * sin[i])
