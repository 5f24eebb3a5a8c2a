"""The sampler over the whole vocabulary, as a step calls it: greedy, sampled, with top-p, with top-k and top-p.

Its own copies and launches are in the time, as they are in a step. It may overwrite logits, so each call gets a copy
of them; what that takes stands beside.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.engine_load import text_request
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.timing import time_calls
from engine.messages import EngineRequest, SamplingParams
from engine.sample_row import SampleRow
from engine.sampler import Sampler
from engine.sequence import Sequence

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.7},
    "top-p": {"temperature": 0.7, "top_p": 0.9},
    "top-k and top-p": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
}
PROMPT_TOKENS = 8
ANSWER_TOKENS = 100
SPREAD = 4.0
"""Standard deviation of the logits: a nucleus of a few hundred tokens, as models have."""


def run(journal: Journal, shape: Shape, device: torch.device, _: Path) -> None:
    """All cells."""
    for batch in shape.batches:
        for kind, params in KINDS.items():
            journal.cell(f"{kind}, batch {batch}", lambda p=params, b=batch: measure(shape, p, b, device))


def measure(shape: Shape, params: dict[str, Any], batch: int, device: torch.device) -> dict[str, Any]:
    """One step's choice for `batch` sequences."""
    vocab_size = shape.config.text.vocab_size
    generator = torch.Generator(device).manual_seed(batch)
    logits = SPREAD * torch.randn(batch, vocab_size, generator=generator, device=device)
    sampler = Sampler(batch, vocab_size, device)
    rows = [SampleRow(Sequence(_request(params), seed, 0)) for seed in range(batch)]
    whole = time_calls([lambda: sampler.sample(logits.clone(), rows, None)], device, capture=False)
    copying = time_calls([logits.clone], device, capture=False)
    return {**whole.row(), "copy_us": 1e6 * copying.best}


def _request(params: dict[str, Any]) -> EngineRequest:
    request = text_request(PROMPT_TOKENS, ANSWER_TOKENS)
    sampling = SamplingParams(max_tokens=ANSWER_TOKENS, **params)
    return EngineRequest(request.request_id, request.prompt_token_ids, sampling)
