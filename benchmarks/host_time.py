"""What a step costs the host with many running sequences: the engine's own code, with the device's work taken out.

    python -m benchmarks.host_time --sequences 64 --steps 300 --output results.json

The scheduler, the core, the input builder, the sampler and the pipe are real; the model is a stub that returns rows
of zeros and always the same logits, so next to nothing is computed. What torch is called for (copies to the device,
the sampler's operations over the checkpoint's small vocabulary) stays in: on a GPU these calls are the host's work
too. Each sequence has a clip of 10 s and asks for tokens without end; measured are steps in which all of them
decode. Times are medians over the steps, and best deciles for machines that are shared, in microseconds.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.report import finish
from engine import channel, model_runner
from engine.core import EngineCore
from engine.messages import AudioClip, EngineArgs, EngineRequest, SamplingParams, StepOutputs
from model.config import num_audio_tokens

CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "tympan-tiny"
CLIP = np.zeros(160_000, dtype=np.float32)
SAMPLING = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    "penalised": {"temperature": 0.7, "top_k": 20, "top_p": 0.5, "repetition_penalty": 1.1},
}


class NoModel(nn.Module):
    """Shapes without computation."""

    def __init__(self, real: Any) -> None:
        super().__init__()
        self.config, self.shard = real.config, real.shard
        generator = torch.Generator().manual_seed(0)
        self._logits = torch.randn(real.config.text.vocab_size, generator=generator).to(real.device)

    def encode_audio(self, clips: list[Any]) -> list[Tensor]:
        """-> [A_i, C] each."""
        width = self.config.text.hidden_size
        return [self._logits.new_zeros(num_audio_tokens(len(samples)), width) for samples in clips]

    def embed(self, token_ids: Tensor) -> Tensor:
        """-> [T, C]"""
        return self._logits.new_zeros(len(token_ids), self.config.text.hidden_size)

    def forward(self, hidden: Tensor, *_: object) -> Tensor:
        """-> the same"""
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """-> [B, V]"""
        return self._logits.expand(len(hidden), -1).clone()


class Stopwatch:
    """Seconds spent in wrapped functions since the last `take`, by name."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = defaultdict(float)

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Replace a method by itself, timed."""
        timed = getattr(owner, method)

        @functools.wraps(timed)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return timed(*args, **kwargs)
            finally:
                self._spent[name] += time.perf_counter() - started

        setattr(owner, method, wrapper)

    def take(self) -> dict[str, float]:
        """And begin anew."""
        spent = dict(self._spent)
        self._spent.clear()
        return spent


def request(index: int, sampling: dict[str, Any]) -> EngineRequest:
    """A clip between a few tokens of text."""
    num_tokens = num_audio_tokens(len(CLIP))
    clip = AudioClip(CLIP, f"clip {index}", 8, num_tokens)
    prompt = tuple(range(8)) + (9,) * num_tokens + tuple(range(20))
    params = SamplingParams(max_tokens=100_000, seed=index, **sampling)
    return EngineRequest(f"chatcmpl-{index:032x}", prompt, params, (clip,))


def build(args: argparse.Namespace) -> EngineCore:
    """An engine whose model computes nothing."""
    core = EngineCore.build(
        EngineArgs(
            str(args.model), device=args.device, max_num_seqs=args.sequences, max_num_batched_tokens=4096,
            kv_cache_memory_bytes=args.kv_bytes, num_threads=1, encoder_cache_bytes=1 << 30,
            async_scheduling=args.async_scheduling,
        )
    )  # fmt: skip
    core.runner.model = NoModel(core.runner.model)  # type: ignore[assignment]
    return core


def measure(args: argparse.Namespace, sampling: dict[str, Any], send: Callable[[object], None]) -> dict[str, Any]:
    """Medians of the parts of a step."""
    core = build(args)
    watch = Stopwatch()
    for owner, method, name in (
        (core.scheduler, "schedule", "schedule"),
        (model_runner, "build_input_batch", "build"),
        (core.runner, "_forward", "build"),
        (core.runner, "sample", "sample"),
        (model_runner.PendingStep, "result", "result"),
        (core.scheduler, "update", "update"),
    ):
        watch.wrap(owner, method, name)
    for index in range(args.sequences):
        core.add_request(request(index, sampling))
    parts = time_steps(core, watch, args, send)
    return {
        "median_us": {name: round(statistics.median(values), 1) for name, values in parts.items()},
        "best_decile_us": {name: round(statistics.quantiles(values, n=10)[0], 1) for name, values in parts.items()},
    }


def time_steps(
    core: EngineCore, watch: Stopwatch, args: argparse.Namespace, send: Callable[[object], None]
) -> dict[str, list[float]]:
    """Microseconds of the parts of each step in which all sequences decode."""
    parts: dict[str, list[float]] = defaultdict(list)
    while len(parts["total"]) < args.steps:
        watch.take()
        started = time.perf_counter()
        outputs = core.step()
        stepped = time.perf_counter()
        send(StepOutputs(tuple(outputs), core.stats))
        sent = time.perf_counter()
        if len(outputs) < args.sequences:
            continue  # prompts are still being computed
        spent = watch.take() | {"send": sent - stepped}
        spent["rest"] = sent - started - sum(spent.values())
        for name, seconds in (spent | {"total": sent - started}).items():
            parts[name].append(seconds * 1e6)
    return parts


def drain(connection: Connection) -> None:
    """The other end of the pipe: reads and forgets."""
    while os.read(connection.fileno(), 1 << 20):
        pass


@contextmanager
def sink() -> Iterator[Callable[[object], None]]:
    """A pipe to another process, as the engine has."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    reader = context.Process(target=drain, args=(theirs,), daemon=True)
    reader.start()
    yield lambda message: channel.send(ours, message)
    ours.close()
    reader.join()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--async-scheduling", action=argparse.BooleanOptionalAction)
    parser.add_argument("--kv-bytes", type=int, default=2 << 30)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with sink() as send:
        results = {name: measure(args, sampling, send) for name, sampling in SAMPLING.items()}
    finish({"sequences": args.sequences, "steps": args.steps, "results": results}, args.output)


if __name__ == "__main__":
    main()
