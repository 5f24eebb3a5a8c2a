"""The engine's heart: one step is schedule -> execute -> update. One thread, no queues; no clock decides anything.

With overlap, one step is in flight between two calls of `step`: the next one is planned and its forward pass queued
before the result of the one before is taken, so that the host works while the device does.

Built by `EngineCore.build` from a checkpoint folder (engine/assembly.py); what was measured meanwhile is in `info`.
"""

from __future__ import annotations

import logging
import random

from engine.answer import SampledToken, failed
from engine.assembly import assemble
from engine.errors import RankError, RequestError
from engine.messages import (
    EngineArgs,
    EngineInfo,
    EngineOutput,
    EngineRequest,
    EngineStats,
    SequenceId,
)
from engine.model_runner import ModelRunner, PendingStep, StepResult
from engine.plan import ScheduledSequence, SchedulerOutput
from engine.request_check import check_request
from engine.scheduler import Scheduler
from engine.sequence import Sequence, SequenceStatus, choice_seed
from engine.workers import OnFailure
from model.loader import Progress

logger = logging.getLogger(__name__)

COMPILE_WAIT_SECONDS = 0.01
"""How long a step without work waits for a grammar before it looks for messages again."""

MAX_FAILED_STEPS = 3
"""Steps in a row in which nothing at all could be computed: then the device is to blame, not a request."""


class EngineCore:
    """Requests in by `add_request`, tokens out by `step`."""

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, info: EngineInfo, seed: int | None = None) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.info = info
        self._overlaps = info.async_scheduling
        self._in_flight: PendingStep | None = None
        """Its plan is `Scheduler.update`d by the next step."""
        self._seeds = random.Random(seed)
        self._num_failed_steps = 0
        """In a row, without a sequence that could be computed."""

    @classmethod
    def build(
        cls, args: EngineArgs, progress: Progress | None = None, on_failure: OnFailure | None = None
    ) -> EngineCore:
        """Raises EngineStartError that says what to mend. See engine/assembly.py."""
        runner, scheduler, info = assemble(args, progress, on_failure)
        return cls(runner, scheduler, info, args.seed)

    def close(self) -> None:
        """End the other ranks."""
        self.runner.workers.close()

    @property
    def has_work(self) -> bool:
        """Whether `step` would compute something, or soon will."""
        return self.scheduler.has_work or self.runner.guidance.is_compiling or self._in_flight is not None

    @property
    def stats(self) -> EngineStats:
        """Counters as of now."""
        return self.scheduler.stats

    def add_request(self, request: EngineRequest) -> None:
        """Queue a request, all its choices. Raises RequestError when it could never run."""
        check_request(request, self.info)
        if self.scheduler.knows(request.request_id) or self.runner.guidance.knows(request.request_id):
            raise RequestError("the request id is in use")
        given = request.sampling.seed
        seed = self._seeds.getrandbits(63) if given is None else given
        choices = [Sequence(request, choice_seed(seed, index), index) for index in range(request.n)]
        if request.sampling.grammar is not None:
            self.runner.guidance.compile(choices)
            return
        for sequence in choices:
            self.scheduler.add(sequence)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Forget a request, or one of its choices. Fine when it has just ended."""
        self.runner.guidance.abort(request_id)
        for sequence_id in self.scheduler.abort(request_id, index):
            self.runner.release(sequence_id)

    def step(self) -> list[EngineOutput]:
        """Compute one step; with overlap, begin one and end the one before. -> what was sampled."""
        refused = self._add_compiled()
        if not self._overlaps:
            plan = self.scheduler.schedule()
            return refused + self._update(plan, self._execute(plan))
        before, self._in_flight = self._in_flight, None
        plan = self.scheduler.schedule(before.plan if before else None)
        step = self._begin(plan, before)
        outputs = []
        if before:
            try:
                result = before.result()
            except Exception as error:
                self._start_over(error)
                return refused
            self._num_failed_steps = 0
            outputs = self._update(before.plan, result)
        return refused + outputs + self._go_on(plan, step)

    def _begin(self, plan: SchedulerOutput, before: PendingStep | None) -> PendingStep | Exception:
        """Queue the forward pass. A step that cannot be queued waits until the one before it is through."""
        try:
            return self.runner.launch(plan, before)
        except Exception as error:
            return error

    def _go_on(self, plan: SchedulerOutput, step: PendingStep | Exception) -> list[EngineOutput]:
        """Queue the rest, now that all tokens before it are known. -> outputs only if that fails."""
        if isinstance(step, PendingStep):
            try:
                self.runner.sample(step)
            except Exception as error:
                step = error
        if isinstance(step, Exception):
            return self._update(plan, self._recover(plan, step))
        if plan.clips_to_encode or _unfinished(plan):
            self._in_flight = step
        return []

    def _start_over(self, error: Exception) -> None:
        """The step in flight is lost: compute all that runs again, without overlap, which finds the culprit."""
        logger.error("a step in flight failed; from now on each is waited for", exc_info=error)
        self._num_failed_steps += 1
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            raise error
        self._overlaps = False
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            self.runner.sampler.penalties.release(sequence.sequence_id)
        self.scheduler.recompute_all()

    def _update(self, plan: SchedulerOutput, result: StepResult) -> list[EngineOutput]:
        """Take a result in. -> what it gave to those that have not ended since."""
        if result.encoding:
            plan.note_encoding(*result.encoding)
        unfinished = {item.sequence.sequence_id for item in _unfinished(plan)}
        sampled = {key: token for key, token in result.sampled.items() if key in unfinished}
        outputs = self.scheduler.update(plan, self.runner.guidance.advance(sampled), result.failed_clips)
        for output in outputs:
            if output.finish_reason is not None:
                self.runner.release(output.sequence_id)
        return outputs

    def _add_compiled(self) -> list[EngineOutput]:
        """Queue the sequences whose grammars are ready. -> the last words of those that have none."""
        refused = []
        wait_s = 0.0 if self.scheduler.has_work or self._in_flight else COMPILE_WAIT_SECONDS
        for sequence, error in self.runner.guidance.take_compiled(wait_s):
            if error:
                refused.append(failed(sequence.sequence_id, error))
            else:
                self.scheduler.add(sequence)
        return refused

    def _execute(self, plan: SchedulerOutput) -> StepResult:
        """Run a plan; when that raises, run its sequences one at a time, so that only the culprit ends."""
        try:
            result = self.runner.execute(plan)
        except Exception as error:
            return self._recover(plan, error)
        self._num_failed_steps = 0
        return result

    def _recover(self, plan: SchedulerOutput, error: Exception) -> StepResult:
        if isinstance(error, RankError):
            raise error
        logger.error(
            "a step failed; its %d sequences are computed one at a time", len(plan.scheduled), exc_info=error
        )
        self._num_failed_steps += 1
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            raise error
        return self._execute_one_by_one(plan)

    def _execute_one_by_one(self, plan: SchedulerOutput) -> StepResult:
        """Computing a token again writes what it wrote before; only counts of tokens have to be made anew."""
        sampled: dict[SequenceId, tuple[SampledToken, ...]] = {}
        failed_clips: set[str] = set()
        for item in _unfinished(plan):
            self.runner.sampler.penalties.release(item.sequence.sequence_id)
            hashes = {
                clip.content_hash for clip in item.sequence.clips_within(item.start, item.start + item.num_tokens)
            }
            clips = tuple(clip for clip in plan.clips_to_encode if clip.content_hash in hashes)
            try:
                result = self.runner.execute(SchedulerOutput((item,), clips, plan.evicted_clips))
            except RankError:
                raise
            except Exception:
                logger.exception("one sequence fails alone")
                error = SampledToken(0, error="the request failed inside the engine")
                sampled[item.sequence.sequence_id] = (error,)
                continue
            self._num_failed_steps = 0
            sampled |= result.sampled
            failed_clips |= result.failed_clips
        return StepResult(sampled, self.runner.without_embeddings(plan.clips_to_encode) | failed_clips)


def _unfinished(plan: SchedulerOutput) -> list[ScheduledSequence]:
    """What is left of a plan when some of its sequences have ended."""
    return [item for item in plan.scheduled if item.sequence.status is not SequenceStatus.FINISHED]
