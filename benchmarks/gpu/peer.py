"""Hugging Face's `generate` on static batches: the same shape, prompts and answers as `offline`, the best batch
counts.

In its favour: features are made beforehand, on the device and of noise, so that none of its time goes into them,
and nothing is padded, since all requests are equally long. The batch grows until memory runs out.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.engine_load import FIRST_TEXT_ID, LAST_TEXT_ID, free_memory
from benchmarks.gpu.journal import Journal, Unavailable
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.timing import synchronise
from model.config import MAX_MEL_FRAMES, SAMPLE_RATE, num_audio_tokens, num_mel_frames

WARM_UP_TOKENS = 3


def run(journal: Journal, shape: Shape, device: torch.device, folder: Path) -> None:
    """The model, then a cell for each batch, smallest first; none after memory has run out."""
    names = [f"batch {batch}" for batch in shape.peer_batches]
    if not journal.lacks(names):
        return
    model = journal.attempt("start", lambda: build(folder, device), facts_of)
    if model is None:
        return
    for batch, name in zip(shape.peer_batches, names, strict=True):
        journal.cell(name, lambda b=batch: measure(model, shape, b, device))
        free_memory(device)


def build(folder: Path, device: torch.device) -> Any:
    """Random weights on the device, as the library makes them. Raises Unavailable where it is not installed."""
    try:
        from transformers import AutoConfig, Qwen2AudioForConditionalGeneration
    except ImportError as error:
        raise Unavailable(f"transformers: {error}") from error
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = Qwen2AudioForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(usual)
    return model.to(device=device, dtype=torch.bfloat16).eval()


def facts_of(model: Any) -> dict[str, Any]:
    """How it attends, and its size."""
    attention = getattr(model.config, "_attn_implementation", None)
    return {"attention": attention, "parameters": sum(parameter.numel() for parameter in model.parameters())}


def make_inputs(shape: Shape, batch: int, device: torch.device) -> dict[str, torch.Tensor]:
    """What the library's processor gives for `batch` prompts of one clip each, placeholders expanded."""
    samples = round(shape.prompt_clip_seconds * SAMPLE_RATE)
    count = num_audio_tokens(samples)
    generator = torch.Generator(device).manual_seed(batch)
    size = (batch, max(count + 2, shape.prompt_tokens))
    ids = torch.randint(FIRST_TEXT_ID, LAST_TEXT_ID, size, generator=generator, device=device)
    ids[:, 1 : 1 + count] = shape.config.audio_token_id
    bins = shape.config.audio.num_mel_bins
    features = torch.randn(batch, bins, MAX_MEL_FRAMES, generator=generator, device=device).to(torch.bfloat16)
    mask = torch.zeros(batch, MAX_MEL_FRAMES, dtype=torch.long, device=device)
    mask[:, : num_mel_frames(samples)] = 1
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_features": features,
        "feature_attention_mask": mask,
    }


def measure(model: Any, shape: Shape, batch: int, device: torch.device) -> dict[str, Any]:
    """One batch, start to end, after a short one of the same size."""
    inputs = make_inputs(shape, batch, device)
    generate(model, inputs, WARM_UP_TOKENS)
    synchronise(device)
    started = time.perf_counter()
    generate(model, inputs, shape.output_tokens)
    synchronise(device)
    wall_s = time.perf_counter() - started
    return {
        "wall_s": wall_s,
        "requests_per_s": batch / wall_s,
        "output_tokens_per_s": batch * shape.output_tokens / wall_s,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def generate(model: Any, inputs: dict[str, torch.Tensor], num_tokens: int) -> None:
    """Greedy, exactly `num_tokens`. Raises RuntimeError if it gives others."""
    with torch.inference_mode():
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=num_tokens, min_new_tokens=num_tokens, pad_token_id=0
        )
    if out.shape[1] != inputs["input_ids"].shape[1] + num_tokens:
        raise RuntimeError(f"generate gave {out.shape[1] - inputs['input_ids'].shape[1]} tokens, not {num_tokens}")
