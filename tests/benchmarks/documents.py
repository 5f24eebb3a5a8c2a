"""A comparison as benchmarks.compare writes it, of made-up figures."""

from __future__ import annotations

import copy
from typing import Any


def side(requests_per_s: float, ttft_s: float, token_s: float) -> dict[str, Any]:
    return {"requests_per_s": requests_per_s, "ttft_s": ttft_s, "time_per_output_token_s": token_s}


def cell(clip_seconds: float, concurrency: int, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    ratio = {name: ours[name] / theirs[name] for name in ours}
    at = {"clip_seconds": clip_seconds, "concurrency": concurrency}
    return {**at, "tympan": ours, "vllm": theirs, "ratio": ratio}


def batch(clip_seconds: float, requests: int, speedup: float) -> dict[str, Any]:
    return {
        "clip_seconds": clip_seconds,
        "requests": requests,
        "speedup": speedup,
        "requests_per_s": {"tympan": speedup, "transformers": 1.0},
        "ttft_s": {name: {"p50": 2.0 * requests} for name in ("tympan", "transformers")},
    }


def comparison() -> dict[str, Any]:
    """Every line of the bar holds."""
    return copy.deepcopy(
        {
            "date": "2026-11-24T12:00:00+00:00",
            "hardware": {"cpu": "a CPU", "cores": 2, "gpu": None},
            "checkpoint": {"size": "small", "parameters": 63_000_000, "dtype": "bfloat16"},
            "settings": {"output_tokens": 64, "rounds": 2, "kv_cache_gib": 2},
            "servers": {
                "tympan": {"ready_s": 4.0, "memory_bytes": 1 << 30},
                "vllm": {"ready_s": 60.0, "memory_bytes": 5 << 30},
            },
            "cells": [
                cell(10.0, 1, side(3.0, 0.1, 0.005), side(1.5, 0.25, 0.008)),
                cell(10.0, 16, side(6.0, 1.5, 0.02), side(3.0, 4.0, 0.021)),
                cell(2.0, 1, side(4.0, 0.05, 0.005), side(2.0, 0.2, 0.007)),
                cell(2.0, 16, side(12.0, 0.5, 0.015), side(4.0, 3.0, 0.02)),
            ],
            "offline": [batch(10.0, 1, 3.0), batch(10.0, 16, 4.5), batch(2.0, 1, 3.0), batch(2.0, 16, 8.0)],
        }
    )
