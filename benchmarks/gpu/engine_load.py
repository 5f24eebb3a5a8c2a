"""Engines to measure: built in this process from a folder without weights, fed with prompts that share nothing."""

from __future__ import annotations

import gc
import itertools
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.journal import Unavailable
from benchmarks.gpu.shapes import Shape
from benchmarks.offline import make_clips
from engine.core import EngineCore
from engine.errors import EngineStartError
from engine.messages import AudioClip, EngineArgs, EngineRequest, SamplingParams
from model.config import num_audio_tokens

FIRST_TEXT_ID, LAST_TEXT_ID = 16, 1200

_numbers = itertools.count()


def engine_args(folder: Path, device: torch.device, **changes: Any) -> EngineArgs:
    """Random weights in bfloat16. Raises Unavailable for a field that this version of the engine does not have."""
    known = {field.name for field in fields(EngineArgs)}
    if missing := set(changes) - known:
        raise Unavailable(f"this version has no {', '.join(sorted(missing))}")
    defaults = {"load_format": "dummy", "device": device.type, "dtype": "bfloat16", "seed": 0}
    return EngineArgs(str(folder), **{**defaults, **changes})


def build_engine(folder: Path, device: torch.device, **changes: Any) -> EngineCore:
    """In this process. Raises Unavailable for what this machine, or this version, cannot do."""
    try:
        return EngineCore.build(engine_args(folder, device, **changes))
    except EngineStartError as error:
        raise Unavailable(f"the engine does not start: {error}") from error


def free_memory(device: torch.device) -> None:
    """Give back what an engine, which nobody refers to any more, has left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def text_request(num_tokens: int, max_tokens: int) -> EngineRequest:
    """A prompt of random tokens, answered greedily with exactly `max_tokens`."""
    number = next(_numbers)
    ids = np.random.default_rng(number).integers(FIRST_TEXT_ID, LAST_TEXT_ID, num_tokens).tolist()
    return EngineRequest(f"r{number}", tuple(ids), SamplingParams(max_tokens=max_tokens, temperature=0.0))


def clip_request(shape: Shape, seconds: float, num_tokens: int, max_tokens: int) -> EngineRequest:
    """The same with a clip of its own in front of the text; `num_tokens` counts both, if there is room for text."""
    number = next(_numbers)
    (samples,) = make_clips(1, seconds, seed=number)
    count = num_audio_tokens(len(samples))
    text = np.random.default_rng(number).integers(FIRST_TEXT_ID, LAST_TEXT_ID, max(2, num_tokens - count)).tolist()
    ids = (text[0], *[shape.config.audio_token_id] * count, *text[1:])
    clip = AudioClip(samples, f"clip {number}", 1, count)
    return EngineRequest(f"r{number}", ids, SamplingParams(max_tokens=max_tokens, temperature=0.0), (clip,))
