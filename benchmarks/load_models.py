"""When requests are sent: at given times, or by users who wait for an answer and think before they ask again."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from benchmarks.workload import Job, Mix

Timed = tuple[float, Job]
"""When, in seconds from the start, and what."""


class Load(Protocol):
    """What a fleet is asked."""

    def first(self) -> list[Timed]:
        """What is sent whatever happens."""
        ...

    def after(self, job: Job, now: float) -> Timed | None:
        """What follows from the end of a job."""
        ...


class OpenLoad:
    """Requests come when they come."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs

    def first(self) -> list[Timed]:
        """All of them."""
        return [(job.arrival, job) for job in self._jobs]

    def after(self, job: Job, now: float) -> None:  # noqa: ARG002
        """Nothing."""
        return None


class ClosedLoad:
    """Users who think for `think_s` in the mean (exponential) between an answer and the next question.

    They come one after the other during `ramp_s`, and ask nothing new after `seconds` or `max_requests`.
    """

    def __init__(
        self,
        mix: Mix,
        num_users: int,
        *,
        seconds: float = float("inf"),
        think_s: float = 0.0,
        ramp_s: float = 0.0,
        max_requests: int | None = None,
        seed: int = 0,
    ) -> None:
        self._jobs: list[Iterator[Job]] = [mix.jobs(user, seed) for user in range(num_users)]
        self._generator = random.Random(f"think-{seed}")
        self._seconds, self._think_s, self._ramp_s = seconds, think_s, ramp_s
        self._num_left = max_requests if max_requests is not None else float("inf")

    def first(self) -> list[Timed]:
        """Each user's first question."""
        starts = [self._ramp_s * user / len(self._jobs) for user in range(len(self._jobs))]
        asked = [self._ask(user, at) for user, at in enumerate(starts)]
        return [timed for timed in asked if timed is not None]

    def after(self, job: Job, now: float) -> Timed | None:
        """The same user's next one."""
        if job.user < 0:
            return None
        return self._ask(
            job.user, now + (self._generator.expovariate(1.0 / self._think_s) if self._think_s else 0.0)
        )

    def _ask(self, user: int, at: float) -> Timed | None:
        if at >= self._seconds or self._num_left <= 0:
            return None
        self._num_left -= 1
        return at, next(self._jobs[user])


class Together:
    """Several loads at once, told apart by the `kind` of their jobs."""

    def __init__(self, loads: dict[str, Load]) -> None:
        self._loads = loads

    def first(self) -> list[Timed]:
        """Of all loads."""
        return [(at, replace(job, kind=kind)) for kind, load in self._loads.items() for at, job in load.first()]

    def after(self, job: Job, now: float) -> Timed | None:
        """Of the load that the job was of."""
        following = self._loads[job.kind].after(job, now)
        return following and (following[0], replace(following[1], kind=job.kind))
