"""The real engine, timed: what a step costs on this machine, and how a load went that the simulator predicts too.

`fit` drives a core step by step through a few designed loads and fits prices to the counts of each step's work.
`measure` serves a load by the engine's process, as a server would, without HTTP in front. Needs torch.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.optimize import nnls
from tqdm import tqdm

from benchmarks.cost_model import LinearCost, StepWork, work_of
from benchmarks.load_models import ClosedLoad, Timed
from benchmarks.offline import make_clips
from benchmarks.workload import Job, engine_request, num_samples
from engine.client import ProcessEngineClient
from engine.core import EngineCore
from engine.messages import AudioClip, EngineArgs, EngineRequest, SamplingParams
from engine.plan import SchedulerOutput
from model.config import Qwen2AudioConfig


@dataclass(frozen=True, slots=True)
class Design:
    """A load for calibration: so many requests at once, all alike."""

    requests: int
    clip_seconds: float
    text_tokens: int
    output_tokens: int


LARGEST_CHUNK = 2048
DESIGNS = (
    Design(1, 2.0, 50, 16),
    Design(1, 10.0, 50, 16),
    Design(1, 30.0, 50, 8),
    Design(4, 2.0, 50, 12),
    Design(4, 10.0, 50, 12),
    Design(8, 0.0, 700, 8),
    Design(16, 2.0, 50, 12),
    Design(16, 10.0, 50, 12),
    Design(1, 0.0, 3000, 8),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request as measured, in seconds."""

    ttft: float
    end_to_end: float
    gaps: tuple[float, ...]


def fit(args: EngineArgs, repeats: int = 3) -> LinearCost:
    """Time the designs and fit a price for each count. -> the prices, and how far off they are."""
    core = EngineCore.build(replace(args, max_num_batched_tokens=LARGEST_CHUNK, async_scheduling=False))
    audio_id, num_text_ids = _ids(Path(args.model_folder))
    rows: list[tuple[StepWork, float]] = []
    number = 0
    _run_design(core, DESIGNS[0], audio_id, num_text_ids, number)  # first touches
    for design in tqdm(DESIGNS, desc="calibration", unit="load"):
        runs = []
        for _ in range(repeats):
            number += 1
            runs.append(_run_design(core, design, audio_id, num_text_ids, number))
        for steps in zip(*runs, strict=True):
            assert len({work for work, _ in steps}) == 1, "the same load gives the same plans"
            rows.append((steps[0][0], statistics.median(seconds for _, seconds in steps)))
    counts = np.array([work for work, _ in rows], dtype=float)
    seconds = np.array([taken for _, taken in rows])
    scale = counts.max(axis=0)
    scale[scale == 0] = 1.0
    prices, _ = nnls(counts / scale / seconds[:, None], np.ones(len(rows)))  # the error that counts is relative
    prices /= scale
    errors = np.abs(counts @ prices / seconds - 1)
    info = core.info
    return LinearCost(
        tuple(prices.tolist()),
        fitted=f"{len(rows)} steps on {info.device}, {info.dtype}, {info.attention_backend}; "
        f"off by {np.median(errors):.1%} in the median, {np.quantile(errors, 0.95):.1%} at the 95th percentile",
        kv_cache_tokens=(info.num_blocks - 1) * info.block_size,
        frame_cost=core.scheduler.frame_cost,
    )


def _run_design(
    core: EngineCore, design: Design, audio_id: int, num_text_ids: int, number: int
) -> list[tuple[StepWork, float]]:
    """-> work and seconds of each step."""
    clips = (design.clip_seconds,) if design.clip_seconds else ()
    for index in range(design.requests):
        job = Job(clips, design.text_tokens, design.output_tokens, conversation=1000 * number + index)
        core.add_request(real_request(job, audio_id, num_text_ids))
    plans: list[SchedulerOutput] = []
    schedule = core.scheduler.schedule

    def listen() -> SchedulerOutput:
        plans.append(schedule())
        return plans[-1]

    core.scheduler.schedule = listen  # type: ignore[method-assign]
    steps = []
    try:
        while core.has_work:
            plans.clear()
            started = time.perf_counter()
            core.step()
            taken = time.perf_counter() - started
            steps.append((_sum(plans), taken))
    finally:
        core.scheduler.schedule = schedule  # type: ignore[method-assign]
    return [step for step in steps if step[0].num_tokens]


def _sum(plans: list[SchedulerOutput]) -> StepWork:
    return StepWork(*(sum(values) for values in zip(StepWork(0), *map(work_of, plans), strict=True)))


async def measure(client: ProcessEngineClient, folder: Path, load: ClosedLoad) -> tuple[list[Outcome], float]:
    """Serve a load. -> its requests, and seconds from the first question to the last answer."""
    audio_id, num_text_ids = _ids(folder)
    outcomes: list[Outcome] = []

    async def user(timed: Timed | None) -> None:
        while timed is not None:
            request = real_request(timed[1], audio_id, num_text_ids)
            outcomes.append(await _one(client, request))
            timed = load.after(timed[1], 0.0)

    started = time.perf_counter()
    await asyncio.gather(*(user(timed) for timed in load.first()))
    return outcomes, time.perf_counter() - started


async def _one(client: ProcessEngineClient, request: EngineRequest) -> Outcome:
    started = time.perf_counter()
    times = [time.perf_counter() async for output in client.generate(request) if output.new_token_ids]
    assert len(times) == request.sampling.max_tokens
    gaps = tuple(later - earlier for earlier, later in itertools.pairwise(times))
    return Outcome(times[0] - started, times[-1] - started, gaps)


def real_request(job: Job, audio_id: int, num_text_ids: int) -> EngineRequest:
    """The simulator's request, with sound in its clips and tokens that the model has. No two jobs are alike."""
    made = engine_request(job, f"{job.conversation}-{job.turn}")
    generator = np.random.default_rng(job.conversation)
    text = generator.integers(0, num_text_ids, len(made.prompt_token_ids)).tolist()
    ids = list(text)
    clips = []
    for clip, seconds in zip(made.clips, job.clip_seconds, strict=True):
        (samples,) = make_clips(1, seconds, seed=job.conversation)
        assert len(samples) == num_samples(seconds)
        ids[clip.offset : clip.offset + clip.num_tokens] = [audio_id] * clip.num_tokens
        clips.append(AudioClip(samples, f"{clip.content_hash}-{made.request_id}", clip.offset, clip.num_tokens))
    sampling = SamplingParams(max_tokens=job.output_tokens, temperature=0.0)
    return EngineRequest(made.request_id, tuple(ids), sampling, tuple(clips))


def _ids(folder: Path) -> tuple[int, int]:
    """-> the audio placeholder's id, and how many ids below it are plain text."""
    audio_id = Qwen2AudioConfig.from_folder(folder).audio_token_id
    return audio_id, min(audio_id, 1000)
