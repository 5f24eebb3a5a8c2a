"""Every attention backend that runs here, at the decode batches, prompts and clips of the bar, one layer at a time.

A decode is held against the memory, since it reads all keys and values and computes little; a prompt and a clip
against the arithmetic. `error` is the largest difference to plain torch: a kernel that is wrong is not fast.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.gpu.attention_load import Load, make_encoder_load, make_load, takes_fp8
from benchmarks.gpu.floors import attention_flop
from benchmarks.gpu.journal import Journal, Unavailable
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.timing import Timing, time_calls
from configs.settings import Settings
from model.attention import AttentionBackend, EncoderMetadata, select_backend
from model.config import MAX_AUDIO_SAMPLES, SAMPLE_RATE, num_conv_frames, num_mel_frames
from model.errors import ConfigError

FASTEST_FIRST = ("triton", "flash_attn", "torch_varlen", "cpu", "reference")


def backend_names() -> list[str]:
    """All that `--attention-backend` knows, those that should win first."""
    known = set(get_args(Settings.model_fields["attention_backend"].annotation)) - {"auto"}
    return sorted(known, key=lambda name: FASTEST_FIRST.index(name) if name in FASTEST_FIRST else 0)


def find_backend(name: str, device: torch.device) -> AttentionBackend:
    """Raises Unavailable with the reason."""
    try:
        return select_backend(name, device)[0]
    except ConfigError as error:
        raise Unavailable(str(error)) from error


def run(journal: Journal, shape: Shape, device: torch.device, _: Path) -> None:
    """All cells."""
    for name in backend_names():
        backend = journal.attempt(name, lambda name=name: find_backend(name, device), facts_of)
        if backend is None:
            continue
        for batch in shape.batches:
            journal.cell(f"{name} decode {batch}", lambda b=batch, k=backend: decode(shape, k, b, device))
        for length in shape.prompts:
            journal.cell(f"{name} prompt {length}", lambda n=length, k=backend: prompt(shape, k, n, device))
        for seconds in shape.clip_seconds:
            journal.cell(f"{name} clip {seconds:g} s", lambda s=seconds, k=backend: clip(shape, k, s, device))
        if takes_fp8(backend):
            for batch in shape.batches:
                cell = f"{name} decode {batch} fp8"
                journal.cell(cell, lambda b=batch, k=backend: decode(shape, k, b, device, fp8=True))


def facts_of(backend: AttentionBackend) -> dict[str, Any]:
    """What a backend says of itself."""
    return {"block_sizes": backend.block_sizes, "supports_graphs": supports_graphs(backend)}


def supports_graphs(backend: AttentionBackend) -> bool:
    """Whether a step with it may be captured."""
    return bool(getattr(backend, "supports_graphs", False))


def decode(
    shape: Shape, backend: AttentionBackend, batch: int, device: torch.device, *, fp8: bool = False
) -> dict[str, Any]:
    """One token each for `batch` sequences of the same context."""
    load = make_load(shape.config.text, backend, (1,) * batch, (shape.context,) * batch, device, fp8=fp8)
    timing = _time(load, backend, device)
    return {
        **timing.row(),
        "kv_bytes": load.kv_bytes,
        "bytes_per_s": load.kv_bytes / timing.best,
        "error": load.error(backend),
    }


def prompt(shape: Shape, backend: AttentionBackend, length: int, device: torch.device) -> dict[str, Any]:
    """A whole prompt of one sequence."""
    text = shape.config.text
    load = make_load(text, backend, (length,), (length,), device)
    timing = _time(load, backend, device)
    flop = attention_flop(length, length, text.num_attention_heads, text.head_dim, causal=True)
    return {**timing.row(), "flop_per_s": flop / timing.best, "error": load.error(backend)}


def clip(shape: Shape, backend: AttentionBackend, seconds: float, device: torch.device) -> dict[str, Any]:
    """One clip in the encoder."""
    audio = shape.config.audio
    samples = min(MAX_AUDIO_SAMPLES, round(seconds * SAMPLE_RATE))
    frames = num_conv_frames(num_mel_frames(samples))
    starts = torch.tensor([0, frames], dtype=torch.int32, device=device)
    known = {field.name for field in fields(EncoderMetadata)}
    metadata = EncoderMetadata((frames,), **({"starts": starts} if "starts" in known else {}))
    loads = make_encoder_load(frames, audio.encoder_attention_heads, audio.head_dim, device)
    calls = [lambda parts=parts: backend.encode(*parts, metadata) for parts in loads]
    timing = time_calls(calls, device, capture=supports_graphs(backend))
    flop = attention_flop(frames, frames, audio.encoder_attention_heads, audio.head_dim, causal=False)
    return {**timing.row(), "frames": frames, "flop_per_s": flop / timing.best}


def _time(load: Load, backend: AttentionBackend, device: torch.device) -> Timing:
    calls = [lambda layer=layer: load.decode(backend, layer) for layer in load.layers]
    return time_calls(calls, device, capture=supports_graphs(backend))
