"""Every fused Triton kernel beside the same in plain torch, at decode batches and a step full of prompts.

`bytes` are what has to be read and written once; what torch's operators move between themselves is theirs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.attention_load import DTYPE, make_load
from benchmarks.gpu.journal import Journal, Unavailable
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.timing import Call, num_copies, time_calls
from model.attention.reference import ReferenceBackend
from model.config import TextConfig
from model.layers import RMSNorm, SwiGlu

STEP_TOKENS = 1024


@dataclass(frozen=True)
class Pair:
    """The same work on several inputs, by a kernel and by torch. `kernel` is empty where it cannot run."""

    kernel: list[Call]
    plain: list[Call]
    num_bytes: int


def run(journal: Journal, shape: Shape, device: torch.device, _: Path) -> None:
    """All cells."""
    rows = (*shape.batches, *([STEP_TOKENS] if device.type == "cuda" else []))
    for name, make in PAIRS.items():
        for count in rows:
            journal.cell(f"{name}, {count} rows", lambda m=make, n=count: measure(m, shape, n, device))


def measure(make: Callable[..., Pair], shape: Shape, rows: int, device: torch.device) -> dict[str, Any]:
    """Both sides, in CUDA graphs where that is possible."""
    pair = make(shape.config.text, rows, device)
    plain = time_calls(pair.plain, device)
    row: dict[str, Any] = {"bytes": pair.num_bytes, "plain": plain.row(), "kernel": None}
    if pair.kernel:
        kernel = time_calls(pair.kernel, device)
        row |= {
            "kernel": kernel.row(),
            "bytes_per_s": pair.num_bytes / kernel.best,
            "speedup": plain.best / kernel.best,
        }
    return row


def kernel_of(module: str, name: str, device: torch.device) -> Callable[..., Any] | None:
    """A kernel's launcher. None on a CPU, where Triton compiles nothing. Raises Unavailable."""
    try:
        found = getattr(importlib.import_module(f"model.triton_kernels.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"this version has no {module}.{name}") from error
    return found if device.type == "cuda" else None


def calls_of(function: Callable[..., Any] | None, arguments: list[tuple[Any, ...]]) -> list[Call]:
    """A call for each input; none without a function."""
    return [] if function is None else [lambda a=a: function(*a) for a in arguments]


def normal(*size: int, device: torch.device) -> torch.Tensor:
    """In bfloat16, never zeros."""
    return torch.empty(size, dtype=DTYPE, device=device).normal_()


def rotate_and_write(text: TextConfig, rows: int, device: torch.device) -> Pair:
    """Rotary embedding of queries and keys, keys and values to the cache."""
    kernel = kernel_of("rotate_and_write", "rotate_and_write", device)
    plain = importlib.import_module("model.triton_kernels.rotate_and_write").rotate_and_write_plain
    load = make_load(text, ReferenceBackend(), (1,) * rows, (64,) * rows, device)
    arguments = [(load.heads, load.cos, load.sin, layer, load.metadata.slot_mapping) for layer in load.layers]
    num_bytes = 2 * load.heads.numel() * DTYPE.itemsize
    return Pair(calls_of(kernel, arguments), calls_of(plain, arguments), num_bytes)


def add_rms_norm(text: TextConfig, rows: int, device: torch.device) -> Pair:
    """A residual's sum and its norm."""
    kernel = kernel_of("add_rms_norm", "add_rms_norm", device)
    norm = RMSNorm(text.hidden_size, text.rms_norm_eps).to(device, DTYPE)
    num_bytes = 4 * rows * text.hidden_size * DTYPE.itemsize
    pairs = [
        tuple(normal(rows, text.hidden_size, device=device) for _ in range(2))
        for _ in range(num_copies(num_bytes, device))
    ]

    def plain(x: torch.Tensor, addend: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + addend
        return norm(total), total

    fused = [(*pair, norm.weight, text.rms_norm_eps) for pair in pairs]
    return Pair(calls_of(kernel, fused), calls_of(plain, pairs), num_bytes)


def swiglu(text: TextConfig, rows: int, device: torch.device) -> Pair:
    """silu(gate) * up."""
    kernel = kernel_of("swiglu", "swiglu", device)
    num_bytes = 3 * rows * text.intermediate_size * DTYPE.itemsize
    inputs = [
        (normal(rows, 2 * text.intermediate_size, device=device),) for _ in range(num_copies(num_bytes, device))
    ]
    return Pair(calls_of(kernel, inputs), calls_of(SwiGlu(), inputs), num_bytes)


PAIRS: dict[str, Callable[[TextConfig, int, torch.device], Pair]] = {
    "rotate and write": rotate_and_write,
    "add and RMSNorm": add_rms_norm,
    "SwiGLU": swiglu,
}
