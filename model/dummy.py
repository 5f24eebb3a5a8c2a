"""Random weights of a checkpoint's shape, made where they stay: to measure speed without reading gigabytes.

Seeded, and never zeros: a multiplier that is fed zeros takes less power and runs faster than with a real checkpoint.
Only configuration files of the folder are read. Answers mean nothing, but they are text: the largest logit is never
that of a control token or of one that the tokenizer lacks, so streams show every token.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from model.attention.base import AttentionBackend
from model.config import GenerationConfig, Qwen2AudioConfig
from model.kv_scales import set_kv_scales
from model.loader import Progress
from model.qwen2_audio import Qwen2Audio, unfilled

SEED = 0
STANDARD_DEVIATION = 0.02
NOT_TEXT = 0.01
"""What the rows of other tokens than text are scaled by in `lm_head`."""

logger = logging.getLogger(__name__)


def load_dummy(
    folder: Path,
    config: Qwen2AudioConfig,
    backend: AttentionBackend,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    *,
    fp8_kv: bool = False,
) -> Qwen2Audio:
    """A model as `model.loader.load_model` gives it, but for the values of its weights."""
    logger.warning("the weights are random (--load-format dummy): answers mean nothing")
    model = unfilled(config, backend, dtype, device)
    if config.text.tie_word_embeddings:
        model.lm_head.weight = model.decoder.embed_tokens.weight
    generator = torch.Generator(device).manual_seed(SEED)
    parameters = dict(model.named_parameters())
    for done, (name, parameter) in enumerate(parameters.items(), start=1):
        _fill(name, parameter, generator)
        if progress is not None:
            progress(done, len(parameters))
    special = (config.audio_token_id, *GenerationConfig.from_folder(folder).eos_token_ids)
    model.lm_head.weight[min(special) :].mul_(NOT_TEXT)
    if fp8_kv:
        set_kv_scales(model.decoder.layers, {})
    return model


def _fill(name: str, parameter: nn.Parameter, generator: torch.Generator) -> None:
    """Norms as they begin training, everything else normally distributed."""
    if "norm" in name:
        parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    else:
        parameter.normal_(0.0, STANDARD_DEVIATION, generator=generator)
