"""The parts, most valuable first. A new benchmark is one line of `PARTS`, and a function that fills a journal."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One benchmark: a function of a module of this package, and how long it, and one cell of it, may take."""

    name: str
    function: str
    limit_s: float
    cell_limit_s: float
    what: str


PARTS = (
    Part("ceilings", "ceilings.run", 60, 40, "copy bandwidth, and bf16 products at the model's shapes"),
    Part("steps", "steps.run_base", 150, 120, "the engine's decode steps at batch 1 to 128, and with keys in fp8"),
    Part("http", "http.run", 300, 260, "first token on an idle server, then open loops at several rates"),
    Part("offline", "offline.run", 180, 150, "256 requests of 800 tokens in and 200 out, all at once"),
    Part("transformers", "peer.run", 150, 100, "the same by Hugging Face's generate, at its best batch"),
    Part("kernels", "kernels.run", 150, 40, "every attention backend: decodes, prompts, clips"),
    Part("fused", "fused.run", 60, 40, "every fused kernel beside the same in plain torch"),
    Part("sampling", "sampling.run", 40, 30, "the sampler over the whole vocabulary"),
    Part("variants", "variants.run", 90, 40, "the Triton decode kernel by its tuning knobs"),
    Part("encoder", "encoder.run", 90, 90, "clips of 2 to 30 s, log-mel's share, first tokens without HTTP"),
    Part("memory", "memory.run", 90, 90, "KV blocks with default settings, and the peak while the engine is full"),
    Part("ablations", "steps.run_ablations", 400, 120, "decode steps with one thing changed at a time"),
)


def find_part(name: str) -> Part:
    """The part of that name."""
    return next(part for part in PARTS if part.name == name)
