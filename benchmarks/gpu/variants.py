"""The Triton decode kernel by its knobs: keys in a tile, warps, stages, shares of a sequence, and the cache's
layout.

The first cells have the kernel as it is. What wins here belongs into the table of
model/triton_kernels/paged_decode.py.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.attention_load import Load, make_load
from benchmarks.gpu.journal import Journal, Unavailable
from benchmarks.gpu.kernels import find_backend
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.timing import time_calls
from model.attention import AttentionBackend

TILES = tuple(itertools.product((32, 64, 128), (2, 4, 8), (2, 3)))
"""Keys, warps, stages."""
SHARES = (1, 2, 4, 8, 16)
TILE_BATCH = 64


def run(journal: Journal, shape: Shape, device: torch.device, _: Path) -> None:
    """All cells."""
    backend = journal.attempt("triton", lambda: find_backend("triton", device), lambda _: {})
    if backend is None:
        return
    module = journal.attempt("knobs", find_knobs, lambda module: {"as it is": str(module.TILINGS)})
    if module is None:
        return
    batches = [batch for batch in shape.batches if batch <= 2 * TILE_BATCH]
    largest = min(TILE_BATCH, max(batches))
    for fp8 in (False, True):
        kind = " fp8" if fp8 else ""
        for batch in batches:
            name = f"batch {batch}{kind}, as it is"
            journal.cell(name, lambda b=batch, f=fp8: measure(shape, backend, b, device, fp8=f))
        for tile in TILES:
            name = f"batch {largest}{kind}, {tile[0]} keys, {tile[1]} warps, {tile[2]} stages"
            journal.cell(name, lambda t=tile, f=fp8: tiled(module, t, shape, backend, largest, device, fp8=f))
        for batch, shares in itertools.product(batches, SHARES):
            name = f"batch {batch}{kind}, {shares} shares"
            journal.cell(name, lambda b=batch, n=shares, f=fp8: shared(module, n, shape, backend, b, device, fp8=f))
    for batch in batches:
        name = f"batch {batch}, heads outside tokens"
        journal.cell(name, lambda b=batch: measure(shape, backend, b, device, heads_outside=True))


def find_knobs() -> Any:
    """The kernel's module. Raises Unavailable where it has other knobs than these."""
    module = importlib.import_module("model.triton_kernels.paged_decode")
    if missing := [name for name in ("TILINGS", "Tiling", "num_shares") if not hasattr(module, name)]:
        raise Unavailable(f"the decode kernel has no {', '.join(missing)}")
    return module


def measure(
    shape: Shape,
    backend: AttentionBackend,
    batch: int,
    device: torch.device,
    *,
    fp8: bool = False,
    heads_outside: bool = False,
) -> dict[str, Any]:
    """A decode with what is set now."""
    load = make_load(shape.config.text, backend, (1,) * batch, (shape.context,) * batch, device, fp8=fp8)
    if heads_outside:
        load = replace(load, layers=[move_heads_outside(layer) for layer in load.layers])
    return {**_time(load, backend, device), "error": load.error(backend)}


def move_heads_outside(layer: torch.Tensor) -> torch.Tensor:
    """The same numbers, seen as [2, N, P, Hkv, D] and lying as [2, N, Hkv, P, D]."""
    return layer.transpose(2, 3).contiguous().transpose(2, 3)


def tiled(module: Any, tile: tuple[int, int, int], *args: Any, fp8: bool) -> dict[str, Any]:
    """With another tile."""
    size = 1 if fp8 else 2
    with changed(module, TILINGS={**module.TILINGS, size: module.Tiling(*tile)}):
        return measure(*args, fp8=fp8)


def shared(module: Any, shares: int, *args: Any, fp8: bool) -> dict[str, Any]:
    """With so many shares of each sequence."""
    with changed(module, num_shares=lambda *_: shares):
        return measure(*args, fp8=fp8)


@contextmanager
def changed(module: Any, **values: Any) -> Iterator[None]:
    """Globals of a module, for a while."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _time(load: Load, backend: AttentionBackend, device: torch.device) -> dict[str, Any]:
    timing = time_calls([lambda layer=layer: load.decode(backend, layer) for layer in load.layers], device)
    return {**timing.row(), "bytes_per_s": load.kv_bytes / timing.best}
