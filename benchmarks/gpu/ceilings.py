"""What the device gives at best: copies within its memory, and products of bfloat16 matrices at the model's shapes.

The products of one decode step, summed over the layers, are what a step could take if all else were free.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.floors import linear_shapes
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.timing import num_copies, time_calls


def run(journal: Journal, shape: Shape, device: torch.device, _: Path) -> None:
    """All cells."""
    journal.cell("copy", lambda: copy(shape.copy_bytes, device))
    journal.cell("gemm square", lambda: product(shape.square, shape.square, shape.square, device))
    for rows in shape.gemm_rows:
        journal.cell(f"gemm rows {rows}", lambda rows=rows: products(shape, rows, device))


def copy(size: int, device: torch.device) -> dict[str, Any]:
    """Bytes read and bytes written both count."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.empty_like(source)
    timing = time_calls([lambda: target.copy_(source)], device)
    return {**timing.row(), "bytes": 2 * size, "bytes_per_s": 2 * size / timing.best}


def product(rows: int, outputs: int, inputs: int, device: torch.device) -> dict[str, Any]:
    """x W^T of normal numbers: a device that multiplies zeros is faster than it will be."""
    generator = torch.Generator(device).manual_seed(0)
    size = 2 * outputs * inputs
    weights = [
        torch.empty(outputs, inputs, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator)
        for _ in range(num_copies(size, device))
    ]
    x = torch.empty(rows, inputs, dtype=torch.bfloat16, device=device).normal_(generator=generator)
    timing = time_calls([lambda w=w: torch.nn.functional.linear(x, w) for w in weights], device)
    moved = size + 2 * rows * (inputs + outputs)
    flop = 2 * rows * outputs * inputs
    return {**timing.row(), "bytes_per_s": moved / timing.best, "flop_per_s": flop / timing.best}


def products(shape: Shape, rows: int, device: torch.device) -> dict[str, Any]:
    """Every matrix of the decoder, and what they take in one step."""
    text = shape.config.text
    row: dict[str, Any] = {
        name: product(rows, *matrix, device) for name, matrix in linear_shapes(text).items() if name != "lm_head"
    }
    layer_us = sum(each["us"] for each in row.values())
    outputs, inputs = linear_shapes(text)["lm_head"]
    row["lm_head"] = product(min(rows, max(shape.batches)), outputs, inputs, device)
    return {**row, "step_ms": (text.num_hidden_layers * layer_us + row["lm_head"]["us"]) / 1000}
