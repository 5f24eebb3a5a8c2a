"""What default settings make of a GPU's memory: blocks at the start, and the peak while the engine is full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.engine_load import build_engine, clip_request, free_memory
from benchmarks.gpu.floors import kv_bytes_per_token
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.shapes import Shape
from engine.core import EngineCore

OVERLOAD = 2
"""Times as many requests as run at once."""
ANSWER_TOKENS = 16


def run(journal: Journal, shape: Shape, device: torch.device, folder: Path) -> None:
    """Both cells, and the same with keys and values in float8."""
    for name, changes in {"default": {}, "fp8 KV": {"kv_cache_dtype": "fp8"}}.items():
        core = journal.attempt(
            f"{name}, start", lambda c=changes: build_engine(folder, device, **c), lambda core: capacity(core, shape)
        )
        if core is not None:
            journal.cell(f"{name}, full", lambda c=core: fill(c, shape, device))
        core = None
        free_memory(device)


def capacity(core: EngineCore, shape: Shape) -> dict[str, Any]:
    """Of the KV cache."""
    info, cache = core.info, core.runner.kv_cache
    tokens = (info.num_blocks - 1) * info.block_size
    return {
        "num_blocks": info.num_blocks,
        "block_size": info.block_size,
        "kv_cache_bytes": cache.numel() * cache.element_size(),
        "kv_bytes_per_token": kv_bytes_per_token(shape.config.text, cache.element_size()),
        "tokens": tokens,
        "sequences_of_context": tokens // shape.context,
        "load_s": info.load_seconds,
        **device_memory(core.runner.device),
    }


def fill(core: EngineCore, shape: Shape, device: torch.device) -> dict[str, Any]:
    """Twice as many requests as run at once, a long clip each."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    count = min(OVERLOAD * core.info.max_num_seqs, shape.requests)
    for _ in range(count):
        core.add_request(clip_request(shape, shape.prompt_clip_seconds, shape.prompt_tokens, ANSWER_TOKENS))
    most = 0
    while core.has_work:
        core.step()
        most = max(most, core.stats.num_running)
    return {"requests": count, "most_running": most, **device_memory(device)}


def device_memory(device: torch.device) -> dict[str, Any]:
    """Bytes of the device now, and the most that torch has held. Nothing on a CPU."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "total_bytes": total,
        "free_bytes": free,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }
