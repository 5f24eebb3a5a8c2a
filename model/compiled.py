"""What kernels compiled by numba share: torch's own OpenMP threads, addresses, bits of floats. CPU only.

A kernel of ours must not bring threads of its own: two pools on the same cores wait for each other. GCC's OpenMP
runtime, which torch ships and its operators use, starts a parallel region by `GOMP_parallel(function, argument,
num_threads, flags)` (libgomp's ABI); a function compiled by numba can be handed to it as well as one by GCC.
Work is dealt by an atomic counter rather than in equal shares, so that a thread which loses its core delays one
item and not the whole region.
"""

from __future__ import annotations

import ctypes
import hashlib
import inspect
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import cfunc, from_dtype, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

ParallelRegion = Callable[[int, int, int, int], None]


@cache
def parallel_region() -> ParallelRegion | None:
    """`GOMP_parallel` of the runtime that torch has loaded; None where torch was built with another one."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        function = ctypes.CDLL(str(path)).GOMP_parallel
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        function.restype = None
        return function
    return None


REASSOCIATE = {"reassoc", "contract", "arcp", "nsz"}
"""Liberties that let sums be vectorised, and leave NaN and infinities alone."""

EXP2 = tuple(np.float32(np.log(2.0) ** n / np.prod(np.arange(1.0, n + 1))) for n in range(8))
"""Taylor coefficients of 2^x around 0: good to 1e-7 on [-1/2, 1/2]."""


def structure(arguments: np.dtype[Any]) -> Callable[..., ctypes.Structure]:
    """What makes `arguments` in memory, its fields in order: a fraction of the time of an array of one record."""
    made: Callable[..., ctypes.Structure] = np.ctypeslib.as_ctypes_type(arguments)
    return made


def compile_region(arguments: np.dtype[Any]) -> Callable[[Callable[[Any], None]], int]:
    """Decorator: a function of a pointer to `arguments` -> the address of its machine code.

    What it closes over is constant to the compiler: plain numbers only, so that the code can be kept. It is, beside
    the sources or in the user's cache folder (numba's rules), and compiled anew where neither can be written.

    Each kernel has files of its own, named after all that its code depends on. Numba keeps a function's variants in
    numbered files behind one index, which two processes that write it at once can leave pointing at each other's.
    """

    def decorate(function: Callable[[Any], None]) -> int:
        function.__qualname__ += f".{_fingerprint(function)}"
        signature = types.void(types.CPointer(from_dtype(arguments)))
        try:
            compiled = cfunc(signature, cache=True, fastmath=REASSOCIATE, error_model="numpy")(function)
        except RuntimeError:  # "cannot cache function: no locator available"
            compiled = cfunc(signature, fastmath=REASSOCIATE, error_model="numpy")(function)
        return int(compiled.address)

    return decorate


def _fingerprint(function: Callable[[Any], None]) -> str:
    """What a kernel's machine code depends on: its sources, what it closes over, the compiler and the processor."""
    closed_over = inspect.getclosurevars(function).nonlocals
    assert all(isinstance(value, bool | int | float | type) for value in closed_over.values())
    sources = [Path(file).read_bytes() for file in (function.__code__.co_filename, __file__)]
    processor = binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()
    facts = repr((sorted(closed_over.items()), processor, version("numba"), version("llvmlite"), sources))
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


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


@intrinsic
def prefetch(_typing: Any, _array: Any, _index: Any) -> Any:
    """Ask for the cache line of an array's element. Nothing waits for it."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        element = builder.bitcast(builder.gep(array.data, [arguments[1]]), cgutils.voidptr_t)
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(function, [element, word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(_array, types.int64), codegen


@intrinsic
def start_region(_typing: Any, _start: Any, _kernel: Any, _arguments: Any, _num_threads: Any) -> Any:
    """`parallel_region`, whose address is given, from compiled code: a kernel, its arguments, threads; all int64."""

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, cgutils.voidptr_t, word, word])
        function = builder.inttoptr(arguments[0], kind.as_pointer())
        kernel, given = (builder.inttoptr(address, cgutils.voidptr_t) for address in arguments[1:3])
        builder.call(function, [kernel, given, builder.trunc(arguments[3], word), word(0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def float_of_bits(_typing: Any, _bits: Any) -> Any:
    """An int32's bits as a float32."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def bits_of_float(_typing: Any, _value: Any) -> Any:
    """A float32's bits as an int32."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@njit(inline="always")
def widen(bits: Any) -> Any:
    """A bfloat16, as an int16 of its bits -> float32."""
    return float_of_bits(np.int32(bits) << np.int32(16))


def as_float32(value: Any) -> Any:
    """A float32 as it is, a bfloat16 (an int16 of its bits) widened. For compiled code."""
    raise TypeError(f"{value!r}: as_float32 is for compiled code")


@overload(as_float32, inline="always")
def _as_float32(value: Any) -> Any:
    def of_bits(value: Any) -> Any:
        return widen(value)

    def as_it_is(value: Any) -> Any:
        return value

    return of_bits if value == types.int16 else as_it_is


@njit(inline="always")
def narrow(value: Any) -> Any:
    """A float32 -> the nearest bfloat16 (ties to even), as an int16 of its bits."""
    bits = bits_of_float(value)
    nearest = (bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16)
    return np.int16(nearest) if value == value else np.int16(0x7FC0)


@njit(fastmath=REASSOCIATE, inline="always")
def exp2(x: Any) -> Any:
    """2^x to about 1e-7, in a form that vectorises. Between -126 and 127, else that bound's; NaN for NaN."""
    x = np.float32(-126) if x < np.float32(-126) else x
    x = np.float32(127) if x > np.float32(127) else x
    whole = np.floor(x + np.float32(0.5))
    r = x - whole
    power = EXP2[7]
    power = power * r + EXP2[6]
    power = power * r + EXP2[5]
    power = power * r + EXP2[4]
    power = power * r + EXP2[3]
    power = power * r + EXP2[2]
    power = power * r + EXP2[1]
    power = power * r + EXP2[0]
    return power * float_of_bits((np.int32(whole) + np.int32(127)) << np.int32(23))


@njit(error_model="numpy")
def largest(values: Any) -> Any:
    """Of float32, by the order of their bits: a loop over integers is vectorised, one over floats is not.

    A NaN with its sign clear is the largest of all.
    """
    most = np.int32(-(2**31))
    for i in range(values.shape[0]):
        bits = bits_of_float(values[i])
        most = max(most, bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return float_of_bits(most ^ ((most >> np.int32(31)) & np.int32(0x7FFFFFFF)))
