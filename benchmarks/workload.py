"""Who asks what and when: generated or recorded load for the simulator. Torch-free, and the same for the same seed.

A `Job` is one request. Open loads have arrival times; in closed ones each user thinks after an answer, then asks
again. A conversation's later turns repeat all that was said before, as chat clients do.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from engine.messages import AudioClip, EngineRequest, SamplingParams
from model.config import MAX_AUDIO_SECONDS, SAMPLE_RATE, num_audio_tokens

TEMPLATE_TOKENS = 30
"""Of the chat template around a question."""
FIRST_TEXT_ID = 16
AUDIO_ID = 9


@dataclass(frozen=True, slots=True)
class Job:
    """One request. Its tokens are told apart by conversation, so that only turns of one share a prefix."""

    clip_seconds: tuple[float, ...]
    text_tokens: int
    """Of the prompt, beside the clips."""
    output_tokens: int
    arrival: float = 0.0
    """Seconds from the start; of no meaning in a closed load."""
    user: int = 0
    conversation: int = 0
    turn: int = 0
    priority: int = 0
    kind: str = "request"
    """The name under which results are kept apart."""

    @property
    def prompt_tokens(self) -> int:
        """Placeholders of audio included."""
        return self.text_tokens + sum(num_audio_tokens(num_samples(seconds)) for seconds in self.clip_seconds)


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Median and spread, held within bounds."""

    median: float
    sigma: float
    low: float
    high: float

    def draw(self, generator: random.Random) -> float:
        """One value."""
        value = self.median * math.exp(self.sigma * generator.gauss(0.0, 1.0))
        return min(self.high, max(self.low, value))


@dataclass(frozen=True, slots=True)
class Mix:
    """What users ask for."""

    clip_seconds: LogNormal = field(default=LogNormal(10.0, 0.7, 1.0, MAX_AUDIO_SECONDS))
    question_tokens: LogNormal = field(default=LogNormal(20.0, 0.6, 4, 200))
    answer_tokens: LogNormal = field(default=LogNormal(120.0, 0.7, 8, 512))
    multi_turn_share: float = 0.2
    """Of the requests, that go on with the conversation before."""
    max_prompt_tokens: int = 6000

    def jobs(self, user: int, seed: int) -> Iterator[Job]:
        """Without end: what one user asks, one after the other."""
        generator = random.Random(f"{seed}-{user}")
        last: Job | None = None
        while True:
            question = TEMPLATE_TOKENS + round(self.question_tokens.draw(generator))
            output = round(self.answer_tokens.draw(generator))
            goes_on = generator.random() < self.multi_turn_share
            if last and goes_on and last.prompt_tokens + last.output_tokens + question < self.max_prompt_tokens:
                text = last.text_tokens + last.output_tokens + question
                clips, conversation, turn = last.clip_seconds, last.conversation, last.turn + 1
            else:
                text, turn = question, 0
                clips = (round(self.clip_seconds.draw(generator), 2),)
                conversation = generator.getrandbits(40)
            last = Job(clips, text, output, user=user, conversation=conversation, turn=turn)
            yield last


def fixed_mix(clip_seconds: float, text_tokens: int, output_tokens: int) -> Mix:
    """All requests alike."""

    def exactly(value: float) -> LogNormal:
        return LogNormal(value, 0.0, value, value)

    question = exactly(text_tokens - TEMPLATE_TOKENS)
    return Mix(exactly(clip_seconds), question, exactly(output_tokens), multi_turn_share=0.0)


def poisson(mix: Mix, rate: float, seconds: float, seed: int) -> list[Job]:
    """Arrivals of `rate` a second, each by a user of its own."""
    generator = random.Random(seed)
    jobs: list[Job] = []
    at = generator.expovariate(rate)
    while at < seconds:
        jobs.append(_at(next(mix.jobs(len(jobs), seed)), at))
        at += generator.expovariate(rate)
    return jobs


def read_trace(path: Path) -> list[Job]:
    """JSON lines with arrival, clip_seconds (one or a list), prompt_tokens, output_tokens, and what else Job has.

    prompt_tokens counts the placeholders of the clips, as a server's usage does. What a server wrote with
    `--log-json` is a trace too (see `_logged`); time begins with its first line. Raises ValueError.
    """
    jobs: list[Job] = []
    start: float | None = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            raw = json.loads(line)
            if "logger" in raw:
                ended = datetime.fromisoformat(raw["ts"]).timestamp()
                start = ended if start is None else start
                jobs += _logged(raw, ended - start, 1000 * number)
            else:
                jobs.append(_traced({"conversation": number, **raw}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return sorted(jobs, key=lambda job: job.arrival)


def _traced(raw: dict[str, Any]) -> Job:
    seconds = raw.pop("clip_seconds", [])
    clips = tuple(seconds) if isinstance(seconds, list) else (seconds,)
    audio = sum(num_audio_tokens(num_samples(value)) for value in clips)
    text = raw.pop("prompt_tokens") - audio
    if text < 1 or raw["output_tokens"] < 1 or not all(0 < value <= MAX_AUDIO_SECONDS for value in clips):
        raise ValueError("lengths out of range")
    return Job(clips, text, **raw)


def _logged(raw: dict[str, Any], ended: float, conversation: int) -> list[Job]:
    """The jobs of a line of a server's log; none if it is not of a request that was answered.

    The line tells sums: clips are taken as equally long, and so are the windows of a file, each of which is a job.
    Which prompts began alike it does not tell: every job has a conversation of its own.
    """
    if not raw.get("completion_tokens"):
        return []
    count = raw.get("audio_count", 0)
    clips = (min(raw["audio_seconds"] / count, MAX_AUDIO_SECONDS),) * count if count else ()
    parts = [(clip,) for clip in clips] if "audio" in raw["route"] else [clips]
    arrival = max(0.0, ended - raw["e2e_ms"] / 1000)
    jobs = []
    for index, seconds in enumerate(parts):
        audio = sum(num_audio_tokens(num_samples(value)) for value in seconds)
        text = max(1, raw["prompt_tokens"] // len(parts) - audio)
        output = max(1, raw["completion_tokens"] // len(parts))
        jobs.append(Job(seconds, text, output, arrival, conversation=conversation + index, kind=raw["route"]))
    return jobs


def write_trace(path: Path, jobs: list[Job]) -> None:
    """What `read_trace` reads."""
    lines = [
        {
            "arrival": job.arrival,
            "clip_seconds": list(job.clip_seconds),
            "prompt_tokens": job.prompt_tokens,
            "output_tokens": job.output_tokens,
            "conversation": job.conversation,
            "turn": job.turn,
            "priority": job.priority,
            "kind": job.kind,
        }
        for job in jobs
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def num_samples(seconds: float) -> int:
    """At 16 kHz."""
    return round(seconds * SAMPLE_RATE)


def engine_request(job: Job, request_id: str) -> EngineRequest:
    """The request as the scheduler sees it; its clips' samples take no memory."""
    clips, ids = [], [FIRST_TEXT_ID]
    for index, seconds in enumerate(job.clip_seconds):
        samples = np.broadcast_to(np.float32(0.0), (num_samples(seconds),))
        count = num_audio_tokens(len(samples))
        clips.append(AudioClip(samples, f"{job.conversation}-{index}", len(ids), count))
        ids += [AUDIO_ID] * count
    ids += [text_id(job)] * (job.text_tokens - 1)
    sampling = SamplingParams(max_tokens=job.output_tokens, temperature=0.0)
    return EngineRequest(request_id, tuple(ids), sampling, tuple(clips), priority=job.priority)


def text_id(job: Job) -> int:
    """The one id of all text of a conversation, answers too."""
    return FIRST_TEXT_ID + 1 + job.conversation


def _at(job: Job, arrival: float) -> Job:
    return Job(job.clip_seconds, job.text_tokens, job.output_tokens, arrival, job.user, job.conversation, job.turn)
