"""The decoder's layers for a step of one token of each of a few sequences on a CPU, as one call of compiled code.

So few rows multiply a weight in no more time than Python takes to get from one product to the next: it finds nothing
in the caches any more, through which all weights have just passed. Here a table says, kernel by kernel, what is to
run on what; a compiled loop starts one parallel region after the other. The kernels are those of the layers, but for
the products (`gemv_cpu` of one row, `gemm_cpu` of several).

The table holds addresses of the packed weights and of activations that are kept here: for one thread at a time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from model import fused_cpu, gemm_cpu, gemv_cpu
from model.attention import paged_cpu, rotate_cpu
from model.attention.base import AttentionMetadata
from model.compiled import compile_region, parallel_region, pointer, start_region
from model.layers import RMSNorm
from model.linear import Linear
from model.qwen2 import Qwen2Decoder

PROGRAM = np.dtype([(name, np.int64) for name in ("start", "phases", "num_phases", "counters")])
"""Addresses: of `parallel_region`, of int64 [num_phases, 3] (a kernel, its arguments, threads), of two counters."""
PHASES = 9
"""Of a layer: norm, product, rotation, attention, product, norm, product, activation, product."""
ATTENTION = 3
PRODUCTS = 1, 4, 6, 8
ROW_WISE = 0, 2, 5, 7


class OneTokenPass:
    """See the module's docstring. Gives what `Qwen2Decoder.forward` does, bit for bit but for the order of sums."""

    def __init__(self, decoder: Qwen2Decoder) -> None:
        """decoder: one that `can_run`."""
        attention = decoder.layers[0].self_attn
        self._head_dim = attention.head_dim
        self._num_kv_heads = attention.num_kv_heads
        self._num_heads = attention.o_proj.in_features // attention.head_dim
        self._dtype = decoder.norm.weight.dtype
        self._is_bfloat16 = self._dtype == torch.bfloat16
        self._num_threads = torch.get_num_threads()
        self.max_rows = gemm_cpu.MAX_ROWS if self._is_bfloat16 and gemm_cpu.can_run() else 1
        width, inner = decoder.norm.weight.shape[0], decoder.layers[0].mlp.down_proj.in_features
        self._hidden, self._normal = self._rows(width), self._rows(width)
        self._attended = self._rows(self._num_heads * self._head_dim)
        self._heads = self._rows((self._num_heads + 2 * self._num_kv_heads) * self._head_dim)
        self._turned = self._rows((self._num_heads + self._num_kv_heads) * self._head_dim)
        self._gate_up, self._gated = self._rows(2 * inner), self._rows(inner)
        widest = max(self._heads.shape[1], self._gate_up.shape[1], width) + gemv_cpu.BLOCK
        self._sums = torch.empty(self.max_rows * widest)
        self._scratch = torch.empty(0)
        self._counters = np.zeros(2, dtype=np.int64)
        num_layers = len(decoder.layers)
        self._norms = np.zeros(2 * num_layers + 1, dtype=fused_cpu.ARGUMENTS)
        self._products = np.zeros(4 * num_layers, dtype=gemv_cpu.ARGUMENTS)
        self._rotations = np.zeros(num_layers, dtype=rotate_cpu.ARGUMENTS)
        self._attentions = np.zeros(num_layers, dtype=paged_cpu.ARGUMENTS)
        self._activations = np.zeros(1, dtype=fused_cpu.ARGUMENTS)
        self._layer_numbers = np.arange(num_layers)
        self._fill(decoder)
        self._phases = self._table(num_layers)
        self._num_rows = 0
        region = parallel_region()
        assert region is not None, "can_run has looked"
        start = ctypes.cast(region, ctypes.c_void_p).value  # type: ignore[arg-type]
        self._program = np.zeros(1, dtype=PROGRAM)
        self._program[0] = start, _address(self._phases), len(self._phases), _address(self._counters)
        self._run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compile_program())

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, metadata: AttentionMetadata) -> Tensor:
        """hidden: [T, C], at most `max_rows`; cos, sin: [T, 1, D / 2]; kv: [L, 2, N, P, Hkv, D] -> [T, C].

        All of the weights' type.
        """
        num_rows = len(hidden)
        if num_rows != self._num_rows:
            self._take(num_rows)
        self._hidden[:num_rows] = hidden
        layers = kv.data_ptr() + self._layer_numbers * (kv.stride(0) * kv.itemsize)
        rotations, attentions = self._rotations, self._attentions
        rotations["cos"], rotations["sin"] = cos.data_ptr(), sin.data_ptr()
        rotations["slot_mapping"], rotations["kv_layer"] = metadata.slot_mapping.data_ptr(), layers
        rotations["num_slots"] = kv[0, 0].numel()
        attentions["kv_layer"], attentions["num_blocks"] = layers, kv.shape[2]
        attentions["block_table"] = metadata.block_table.data_ptr()
        attentions["blocks_per_sequence"] = metadata.block_table.shape[1]
        attentions["query_starts"] = metadata.query_starts.data_ptr()
        attentions["seq_lens"] = metadata.seq_lens_device.data_ptr()
        longest = metadata.block_table.shape[1] * kv.shape[3]
        attentions["scratch_per_thread"] = size = self._num_heads * (longest + 2 * self._head_dim)
        if self._scratch.numel() < self._num_threads * size:
            self._scratch = torch.empty(self._num_threads * size)
        attentions["scratch"] = self._scratch.data_ptr()
        kernel = paged_cpu.compile_attention(self._head_dim, kv.shape[3], self._is_bfloat16)
        self._phases[ATTENTION::PHASES, 0] = kernel
        self._run(_address(self._program))
        return self._normal[:num_rows].clone()

    def _take(self, num_rows: int) -> None:
        """Be for steps of so many tokens."""
        self._num_rows = num_rows
        self._norms["num_rows"] = self._activations["num_rows"] = self._products["num_rows"] = num_rows
        self._rotations["num_tokens"] = num_rows
        attentions = self._attentions
        attentions["num_sequences"] = attentions["num_tokens"] = num_rows
        attentions["num_groups"] = paged_cpu.num_groups(self._num_kv_heads, self._num_threads, num_rows)
        product = gemv_cpu.compile_gemv(self._is_bfloat16) if num_rows == 1 else gemm_cpu.compile_gemm()
        for phase in PRODUCTS:
            self._phases[phase::PHASES, 0] = product
        for phase in ROW_WISE:
            self._phases[phase::PHASES, 2] = min(self._num_threads, -(-num_rows // fused_cpu.ROWS))

    def _rows(self, width: int) -> Tensor:
        return torch.zeros(self.max_rows, width, dtype=self._dtype)

    def _fill(self, decoder: Qwen2Decoder) -> None:
        """What stays the same from step to step."""
        heads = self._num_heads, self._num_kv_heads
        for number, layer in enumerate(decoder.layers):
            self._norms[2 * number] = self._norm(layer.input_layernorm)
            self._norms[2 * number + 1] = self._norm(layer.post_attention_layernorm)
            self._products[4 * number : 4 * number + 4] = [
                self._product(layer.self_attn.qkv_proj, self._normal, self._heads),
                self._product(layer.self_attn.o_proj, self._attended, self._hidden, onto=True),
                self._product(layer.mlp.gate_up_proj, self._normal, self._gate_up),
                self._product(layer.mlp.down_proj, self._gated, self._hidden, onto=True),
            ]
        self._norms[-1] = self._norm(decoder.norm)
        counters = _address(self._counters), _address(self._counters) + 8
        self._rotations["half"] = self._head_dim // 2
        self._rotations["num_heads"], self._rotations["num_kv_heads"] = heads
        self._rotations["heads"], self._rotations["turned"] = self._heads.data_ptr(), self._turned.data_ptr()
        self._rotations["next_item"] = counters[0]
        attentions = self._attentions
        attentions["num_heads"], attentions["num_kv_heads"] = heads
        attentions["query"], attentions["query_stride"] = self._turned.data_ptr(), self._turned.shape[1]
        attentions["out"] = self._attended.data_ptr()
        attentions["next_item"], attentions["next_thread"] = counters
        pointers = self._gate_up.data_ptr(), 0, self._gated.data_ptr(), counters[0]
        self._activations[0] = (0, self._gated.shape[1], *pointers, 0.0)

    def _norm(self, norm: RMSNorm) -> tuple[int | float, ...]:
        pointers = self._hidden.data_ptr(), norm.weight.data_ptr(), self._normal.data_ptr(), _address(self._counters)
        return (0, self._hidden.shape[1], *pointers, norm.eps)

    def _product(self, linear: Linear, x: Tensor, out: Tensor, *, onto: bool = False) -> tuple[int, ...]:
        """onto: add to what `out` holds."""
        assert linear.blocks is not None, "can_run has looked"
        bias = 0 if linear.bias is None else linear.bias.data_ptr()
        residual = out.data_ptr() if onto else 0
        pointers = x.data_ptr(), linear.blocks, bias, residual, self._sums.data_ptr(), out.data_ptr()
        return (0, linear.out_features, linear.in_features, *pointers, _address(self._counters))

    def _table(self, num_layers: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """int64 [PHASES L + 1, 3]: a kernel, its arguments' address, threads. `_take` or a step says what is 0."""
        norm, all_threads = fused_cpu.compile_rms_norm(self._is_bfloat16), self._num_threads
        rotate, swiglu = rotate_cpu.compile_rotation(self._is_bfloat16), fused_cpu.compile_swiglu(self._is_bfloat16)
        activations = _address(self._activations)
        phases: list[tuple[int, int, int]] = []
        for number in range(num_layers):
            norms, products = _elements(self._norms, 2 * number), _elements(self._products, 4 * number)
            phases += [
                (norm, norms[0], 0),
                (0, products[0], all_threads),
                (rotate, _elements(self._rotations, number)[0], 0),
                (0, _elements(self._attentions, number)[0], all_threads),
                (0, products[1], all_threads),
                (norm, norms[1], 0),
                (0, products[2], all_threads),
                (swiglu, activations, 0),
                (0, products[3], all_threads),
            ]
        phases.append((norm, _elements(self._norms, 2 * num_layers)[0], 0))
        return np.array(phases, dtype=np.int64)


def can_run(decoder: Qwen2Decoder) -> bool:
    """Whether all its weights are found packed as `gemv_cpu` reads them, and whole."""
    linears: Sequence[Linear] = [module for module in decoder.layers.modules() if isinstance(module, Linear)]  # type: ignore[attr-defined]
    return parallel_region() is not None and all(linear.blocks is not None for linear in linears)


@cache
def compile_program() -> int:
    """-> address of a C function that takes a pointer to PROGRAM."""

    @compile_region(PROGRAM)
    def run(arguments: Any) -> None:
        a = carray(arguments, 1)[0]
        phases = carray(pointer(a.phases), (a.num_phases, 3), np.int64)
        counters = carray(pointer(a.counters), 2, np.int64)
        for i in range(a.num_phases):
            counters[:] = 0
            start_region(a.start, phases[i, 0], phases[i, 1], phases[i, 2])

    return run


def compile_kernels(is_bfloat16: bool) -> None:
    """All but the attention, once for a process. Else everything is float32."""
    compile_program()
    if is_bfloat16 and gemm_cpu.can_run():
        gemm_cpu.compile_gemm()
    for kernel in (
        gemv_cpu.compile_gemv,
        rotate_cpu.compile_rotation,
        fused_cpu.compile_rms_norm,
        fused_cpu.compile_swiglu,
    ):
        kernel(is_bfloat16)


def _address(array: np.ndarray[Any, Any]) -> int:
    return int(array.ctypes.data)


def _elements(array: np.ndarray[Any, Any], first: int) -> list[int]:
    """Addresses of an array's elements, from one on."""
    return [_address(array) + index * array.itemsize for index in range(first, len(array))]
