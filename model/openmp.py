"""Compiled functions on torch's own OpenMP threads. CPU only.

A kernel of ours must not bring threads of its own: two pools on the same cores wait for each other. GCC's OpenMP
runtime, which torch ships and its operators use, starts a parallel region by `GOMP_parallel(function, argument,
num_threads, flags)` (libgomp's ABI); a function compiled by numba can be handed to it as well as one by GCC.
Work is dealt by an atomic counter rather than in equal shares, so that a thread which loses its core delays one
item and not the whole region.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

ParallelRegion = Callable[[int, int, int, int], None]


@cache
def parallel_region() -> ParallelRegion | None:
    """`GOMP_parallel` of the runtime that torch has loaded; None where torch was built with another one."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        function = ctypes.CDLL(str(path)).GOMP_parallel
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        function.restype = None
        return function  # type: ignore[no-any-return]
    return None


@intrinsic
def pointer(_typing: Any, _address: Any) -> Any:
    """An address as a pointer that `numba.carray` takes."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@intrinsic
def take_next(_typing: Any, _address: Any) -> Any:
    """Add one to the int64 at an address, as one atomic operation. -> what was there."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        counter = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.int64), codegen
