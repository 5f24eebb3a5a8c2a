"""The way of a clip on the device: log-mel, encoder, projector, and the first token from the engine behind them.

`clips` cells go the way of the engine from samples on the host to rows of the decoder's input. `first token` cells
run a request through an idle engine in this process; what the server adds to that is audio decoding, the prompt, two
pipes and HTTP.
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
from benchmarks.gpu.timing import Call, synchronise, time_calls
from benchmarks.gpu.variants import changed
from engine.core import EngineCore
from engine.messages import AudioClip
from model import audio_encoder
from model.config import num_mel_frames
from model.log_mel import log_mel

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
            journal.cell(name, lambda s=seconds, n=count: encode(core, shape, s, n, device))
        journal.cell(f"first token, {seconds:g} s clip", lambda s=seconds: first_token(core, shape, s, device))


def build(folder: Path, shape: Shape, device: torch.device) -> EngineCore:
    """An engine for a few requests."""
    free_memory(device)
    length = max(2048, 2 * (shape.prompt_tokens + shape.output_tokens))
    return build_engine(folder, device, max_num_seqs=8, max_model_len=length)


def encode(core: EngineCore, shape: Shape, seconds: float, count: int, device: torch.device) -> dict[str, Any]:
    """`count` clips in one packed run, and the log-mel's part of it."""
    clips = [clip for _ in range(count) for clip in clip_request(shape, seconds, 0, ANSWER_TOKENS).clips]
    whole = time_calls([lambda: core.runner._encode_batch(clips)], device, capture=False)
    calls = log_mel_calls(core, clips)
    mel_s = len(calls) * time_calls(calls, device, capture=False).best
    frames = num_mel_frames(len(clips[0].samples))
    flop = count * encoder_flop(shape.config.audio, shape.config.text.hidden_size, frames)
    core.runner._clips.clear()
    return {
        "ms": 1000 * whole.best,
        "log_mel_ms": 1000 * mel_s,
        "log_mel_share": mel_s / whole.best,
        "flop_per_s": flop / whole.best,
    }


@torch.inference_mode()
def log_mel_calls(core: EngineCore, clips: list[AudioClip]) -> list[Call]:
    """What the encoder asks of `log_mel` in one run of these clips."""
    asked: list[Call] = []

    def note(*args: Any) -> torch.Tensor:
        asked.append(lambda: log_mel(*args))
        return log_mel(*args)

    with changed(audio_encoder, log_mel=note):
        core.runner._encode_batch(clips)
    return asked


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
