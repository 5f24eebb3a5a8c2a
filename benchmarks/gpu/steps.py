"""Steps of the engine in which every sequence decodes: scheduler, model, sampler and the way of the tokens.

`steps` has the default configuration, and keys and values in float8; `ablations` takes one thing away, or adds
one, at a time. Prompts are as much shorter as sequences decode while others still compute theirs, so that the mean
context is the wanted one; the row has what it was.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.engine_load import build_engine, free_memory, text_request
from benchmarks.gpu.journal import Journal, Unavailable
from benchmarks.gpu.kernels import backend_names
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.timing import synchronise
from engine.core import EngineCore

Changes = dict[str, Any]

BASE: dict[str, Changes] = {"default": {}, "fp8 KV": {"kv_cache_dtype": "fp8"}}

WARM_UP_STEPS = 6


def ablations() -> dict[str, Changes]:
    """One change each, what should tell most first."""
    return {
        "no graphs": {"enforce_eager": True},
        "no overlap": {"async_scheduling": False},
        "fp8 weights": {"quantization": "fp8"},
        "fp8 weights and KV": {"quantization": "fp8", "kv_cache_dtype": "fp8"},
        **{f"attention {name}": {"attention_backend": name} for name in backend_names()},
        "neither graphs nor overlap": {"enforce_eager": True, "async_scheduling": False},
    }


def run_base(journal: Journal, shape: Shape, device: torch.device, folder: Path) -> None:
    """The part `steps`."""
    _run(journal, shape, device, folder, BASE)


def run_ablations(journal: Journal, shape: Shape, device: torch.device, folder: Path) -> None:
    """The part `ablations`."""
    _run(journal, shape, device, folder, ablations())


def _run(journal: Journal, shape: Shape, device: torch.device, folder: Path, variants: dict[str, Changes]) -> None:
    """All cells of each variant, on one engine."""
    for name, changes in variants.items():
        cells = {batch: f"{name}, batch {batch}" for batch in shape.batches}
        if not journal.lacks(cells.values()):
            continue
        core = journal.attempt(f"{name}, start", lambda c=changes: build(folder, shape, device, **c), facts_of)
        if core is None:
            continue
        for batch, cell in cells.items():
            journal.cell(cell, lambda b=batch, c=core: time_steps(c, shape, b, device))
            drop_all(core)
        core = None
        free_memory(device)


def build(folder: Path, shape: Shape, device: torch.device, **changes: Any) -> EngineCore:
    """With room for the largest batch and nothing cached."""
    free_memory(device)
    settings = {
        "max_num_seqs": max(shape.batches),
        "max_model_len": 2 * shape.context,
        "enable_prefix_caching": False,
    }
    return build_engine(folder, device, **{**settings, **changes})


def facts_of(core: EngineCore) -> dict[str, Any]:
    """What the engine has chosen."""
    info = core.info
    return {
        "attention_backend": info.attention_backend,
        "attention_reason": info.attention_reason,
        "async_scheduling": info.async_scheduling,
        "block_size": info.block_size,
        "num_blocks": info.num_blocks,
        "load_s": info.load_seconds,
    }


def time_steps(core: EngineCore, shape: Shape, batch: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of a step in which `batch` sequences decode."""
    blocks = -(-(shape.context + shape.steps + batch) // core.info.block_size) + 1
    if batch * blocks >= core.info.num_blocks:
        raise Unavailable(f"{batch} sequences of {shape.context} tokens need {batch * blocks} blocks")
    prompt = max(2, shape.context - (batch + shape.steps) // 2 - WARM_UP_STEPS)
    for _ in range(batch):
        core.add_request(text_request(prompt, shape.context + batch))
    while any(sequence.num_output_tokens == 0 for sequence in all_sequences(core)):
        core.step()
    for _ in range(WARM_UP_STEPS):
        core.step()
    synchronise(device)
    before = statistics.mean(len(sequence.token_ids) for sequence in core.scheduler.running)
    times = []
    began = last = time.perf_counter()
    for _ in range(shape.steps):
        outputs = core.step()
        now = time.perf_counter()
        times.append(now - last)
        last = now
        if len(outputs) != batch:
            raise RuntimeError(f"a step had {len(outputs)} outputs, not {batch}")
    if core._overlaps != core.info.async_scheduling:
        raise RuntimeError("a step failed and the engine went on without overlap: its log has the reason")
    after = statistics.mean(len(sequence.token_ids) for sequence in core.scheduler.running)
    return {
        "ms": 1000 * statistics.median(times),
        "mean_ms": 1000 * (last - began) / shape.steps,
        "worst_ms": 1000 * max(times),
        "context": (before + after) / 2,
        "tokens_per_s": batch * shape.steps / (last - began),
    }


def all_sequences(core: EngineCore) -> list[Any]:
    """Running or not yet."""
    return [*core.scheduler.running, *core.scheduler.waiting]


def drop_all(core: EngineCore) -> None:
    """End what is left of a cell, the step in flight too."""
    for request_id in {sequence.request_id for sequence in all_sequences(core)}:
        core.abort(request_id)
    while core.has_work:
        core.step()
