"""The way of a clip on the device: log-mel, encoder, projector, and the first token from the engine behind them.

`clip` cells run the model's own `encode_audio` on clips that lie on the device. `first token` cells run a request
through an idle engine in this process; what the server adds to that is audio decoding, the prompt, two pipes and
HTTP.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.engine_load import build_engine, clip_request, free_memory
from benchmarks.gpu.floors import encoder_flop
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.timing import synchronise, time_calls
from engine.core import EngineCore
from model.config import SAMPLE_RATE, num_mel_frames
from model.log_mel import log_mel
from model.qwen2_audio import Qwen2Audio

FIRST_TOKENS = 10
WARM_UP = 2
ANSWER_TOKENS = 2


def run(journal: Journal, shape: Shape, device: torch.device, folder: Path) -> None:
    """All cells, on one engine."""
    core = journal.attempt(
        "start", lambda: build(folder, shape, device), lambda core: {"load_s": core.info.load_seconds}
    )
    if core is None:
        return
    for seconds in shape.clip_seconds:
        for count in shape.clips_at_once:
            name = f"{count} clips of {seconds:g} s"
            journal.cell(name, lambda s=seconds, n=count: encode(core.runner.model, shape, s, n, device))
        journal.cell(f"first token, {seconds:g} s clip", lambda s=seconds: first_token(core, shape, s, device))


def build(folder: Path, shape: Shape, device: torch.device) -> EngineCore:
    """An engine for a few requests."""
    free_memory(device)
    length = max(2048, 2 * (shape.prompt_tokens + shape.output_tokens))
    return build_engine(folder, device, max_num_seqs=8, max_model_len=length)


def encode(model: Qwen2Audio, shape: Shape, seconds: float, count: int, device: torch.device) -> dict[str, Any]:
    """`count` clips in one packed run, and the log-mel's part of it."""
    generator = torch.Generator(device).manual_seed(count)
    samples = round(seconds * SAMPLE_RATE)
    clips = [0.1 * torch.randn(samples, generator=generator, device=device) for _ in range(count)]
    whole = time_calls([lambda: model.encode_audio(clips)], device, capture=False)
    bins = shape.config.audio.num_mel_bins
    mel = time_calls([lambda: [log_mel(clip, bins) for clip in clips]], device, capture=False)
    flop = count * encoder_flop(shape.config.audio, shape.config.text.hidden_size, num_mel_frames(samples))
    return {
        "ms": 1000 * whole.best,
        "log_mel_ms": 1000 * mel.best,
        "log_mel_share": mel.best / whole.best,
        "flop_per_s": flop / whole.best,
    }


def first_token(core: EngineCore, shape: Shape, seconds: float, device: torch.device) -> dict[str, Any]:
    """From a request's arrival in the engine to its first token on the host. Median of several clips."""
    times = []
    for _ in range(WARM_UP + FIRST_TOKENS):
        request = clip_request(shape, seconds, 0, ANSWER_TOKENS)
        synchronise(device)
        started = time.perf_counter()
        core.add_request(request)
        while not core.step():
            pass
        times.append(time.perf_counter() - started)
        while core.has_work:
            core.step()
    return {"ms": 1000 * statistics.median(times[WARM_UP:]), "prompt_tokens": len(request.prompt_token_ids)}
