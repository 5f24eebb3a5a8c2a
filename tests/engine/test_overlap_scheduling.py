"""The scheduler with a step in flight: test_scheduler's random machine, with a runner whose results are late."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from engine.answer import SampledToken
from engine.messages import EngineOutput, FinishReason, SequenceId
from engine.plan import PlanInProgress, SchedulerOutput
from engine.scheduler import Scheduler
from engine.sequence import Sequence, SequenceStatus
from tests.engine.test_scheduler import (
    BROKEN,
    STOP,
    FakeRunner,
    Machine,
    add,
    add_choices,
    contents,
    make_scheduler,
    request,
)

Sampled = dict[SequenceId, tuple[SampledToken, ...]]


class LateRunner(FakeRunner):
    """Looks at what is written and read once the tokens of the step before are known: see `settle`."""

    def _compute(self, plan: SchedulerOutput) -> None:
        self.tables = [list(item.sequence.block_table) for item in plan.scheduled]

    def settle(self, plan: SchedulerOutput) -> None:
        """Write all, then read all that came before. Of a sequence that has failed since, a token is anything."""
        size = self.scheduler.blocks.block_size
        written: dict[tuple[int, int], object] = {}
        needed: list[tuple[tuple[int, int], object]] = []
        for item, table in zip(plan.scheduled, self.tables, strict=True):
            stop = item.start + item.num_tokens
            whole = [item.sequence.request.cache_salt, *contents(item.sequence)][: stop + 1]
            whole += [object() for _ in range(stop + 1 - len(whole))]
            for position in range(stop):
                slot = table[position // size], position % size
                needed.append((slot, tuple(whole[: position + 2])))
                if position >= item.start:
                    written[slot] = needed[-1][1]
        self.slots |= written
        for slot, expected in needed:
            assert self.slots.get(slot) == expected, "a sequence would attend to what is not its own"


@dataclass
class Flight:
    """A plan, and what its result will be."""

    plan: SchedulerOutput
    sampled: Sampled
    failed: frozenset[str]


class LateMachine(Machine):
    """Between two steps requests come and go as ever, with one step in flight."""

    flight: Flight | None = None

    def step(self, tokens: list[int], broken: set[int] = frozenset(), clip_fails: bool = False) -> None:  # type: ignore[assignment]
        if not isinstance(self.runner, LateRunner):
            self.runner = LateRunner(self.scheduler)
            self.scheduler.speculation.num_tokens = 0  # drafts and overlap exclude each other
        before, self.flight = self.flight, None
        had_work = self.scheduler.has_work
        plan = self.scheduler.schedule(before.plan if before else None)
        self.runner.execute(plan)
        assert plan.scheduled or before or not had_work, "a step with work to do does none"
        for item in plan.scheduled:
            sequence = item.sequence
            assert len(sequence.token_ids) < sequence.num_prompt_tokens + sequence.sampling.max_tokens
            assert len(sequence.token_ids) + sequence.num_pending_tokens < self.scheduler.max_model_len
        if before:
            self.land(before)
        self.runner.settle(plan)
        sampled, row = {}, 0
        for item in plan.scheduled:
            if item.samples and item.sequence.status is not SequenceStatus.FINISHED:
                error = BROKEN if row in broken else None
                sampled[item.sequence.sequence_id] = (SampledToken(tokens[row % len(tokens)], error=error),)
                row += 1
        failed = frozenset(new.content_hash for new in plan.clips_to_encode[:1]) if clip_fails else frozenset()
        if plan.clips_to_encode or any(item.sequence.status is SequenceStatus.RUNNING for item in plan.scheduled):
            self.flight = Flight(plan, sampled, failed)

    def land(self, flight: Flight) -> None:
        """Every token of a sequence that has not ended comes out once, unless its audio was bad."""
        alive = {key: token for key, token in flight.sampled.items() if key in self.live}
        outputs = self.scheduler.update(flight.plan, alive, flight.failed)
        assert len(outputs) == len({output.sequence_id for output in outputs})
        told = {output.sequence_id for output in outputs}
        assert alive.keys() <= told
        for output in outputs:
            self.check(output, alive, flight.failed)
        for content_hash in flight.failed:
            self.runner.clips.pop(content_hash, None)

    def check(self, output: EngineOutput, alive: Sampled, failed: frozenset[str]) -> None:
        sequence = self.live[output.sequence_id]
        (token,) = alive.get(output.sequence_id, (None,))
        if output.finish_reason is FinishReason.ERROR:
            reads_failed = any(part.content_hash in failed for part in sequence.request.clips)
            assert reads_failed or (token and token.error)
        else:
            assert token is not None
            assert output.new_token_ids == (token.token_id,)
            given = self.given[output.sequence_id]
            given.append(token.token_id)
            assert sequence.token_ids[sequence.num_prompt_tokens :] == given, "a preemption lost a token"
            params = sequence.sampling
            stops = token.token_id == STOP and len(given) >= params.min_tokens
            full = len(given) >= params.max_tokens or len(sequence.token_ids) >= self.scheduler.max_model_len
            expected = FinishReason.STOP if stops else FinishReason.LENGTH if full else None
            assert output.finish_reason is expected
        if output.finish_reason is not None:
            del self.live[output.sequence_id]

    @precondition(lambda self: self.flight)
    @rule(share=st.integers(1, 3))
    def lose_what_is_in_flight(self, share: int) -> None:
        """The device failed: everything is computed again, nothing that was told is forgotten."""
        if share == 1:
            self.scheduler.recompute_all()
            self.flight = None
            assert not self.scheduler.running
            assert self.scheduler.blocks.usage == 0

    @invariant()
    def nothing_is_pending_but_in_a_step(self) -> None:
        if hasattr(self, "scheduler"):
            assert not any(one.num_pending_tokens for one in (*self.scheduler.running, *self.scheduler.waiting))


TestLateMachine = LateMachine.TestCase
TestLateMachine.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def start(scheduler: Scheduler, *sequences: Sequence) -> SchedulerOutput:
    plan = scheduler.schedule()
    assert [item.sequence for item in plan.scheduled] == list(sequences)
    return plan


def tokens(plan: SchedulerOutput, token_id: int) -> Sampled:
    return {item.sequence.sequence_id: (SampledToken(token_id),) for item in plan.scheduled if item.samples}


def test_a_token_whose_value_is_unknown_is_computed_next() -> None:
    scheduler = make_scheduler()
    one = add(scheduler, request("r", [5]))
    first = start(scheduler, one)
    second = scheduler.schedule(first)
    assert [(item.start, item.num_tokens, item.samples) for item in second.scheduled] == [(5, 1, True)]
    scheduler.update(first, tokens(first, 7))
    assert one.token_ids[-1] == 7
    assert one.num_computed_tokens == 5, "what is in flight is not computed yet"


def test_a_sequence_that_ends_has_one_wasted_place_and_its_blocks_are_free() -> None:
    scheduler = make_scheduler()
    one = add(scheduler, request("r", [5]))
    first = start(scheduler, one)
    second = scheduler.schedule(first)
    (output,) = scheduler.update(first, tokens(first, STOP))
    assert output.finish_reason is FinishReason.STOP
    assert scheduler.blocks.usage == 0
    scheduler.schedule(second)
    assert scheduler.update(second, {}) == []


@pytest.mark.parametrize(("params", "length"), [({"max_tokens": 1}, 5), ({"max_tokens": 9}, 39)])
def test_no_place_is_wasted_on_an_end_that_is_known(params: dict[str, int], length: int) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=64)
    one = add(scheduler, request("r", [length], **params))
    first = start(scheduler, one)
    assert scheduler.schedule(first).scheduled == ()
    (output,) = scheduler.update(first, tokens(first, 7))
    assert output.finish_reason is FinishReason.LENGTH


def test_a_preempted_sequence_waits_for_its_token() -> None:
    scheduler = make_scheduler()
    one = add(scheduler, request("r", [5]))
    other = add(scheduler, request("s", [5]))
    first = start(scheduler, one, other)
    scheduler._preempt(one, PlanInProgress(0, 0))
    second = scheduler.schedule(first)
    assert [item.sequence for item in second.scheduled] == [other]
    scheduler.update(first, tokens(first, 7))
    third = scheduler.schedule(second)
    assert [(item.sequence, item.start, item.num_tokens) for item in third.scheduled][-1] == (one, 0, 6)


def test_a_choice_is_never_copied_from_one_that_is_itself_being_copied_to() -> None:
    """The copies of a step read before they write."""
    scheduler = make_scheduler(max_num_batched_tokens=64)
    choices = add_choices(scheduler, request("r", [6], n=3, max_tokens=9))
    plan = start(scheduler, choices[0])
    scheduler.update(plan, tokens(plan, 7))
    plan = scheduler.schedule()
    scheduler.update(plan, tokens(plan, 7))
    for sequence in (choices[0], choices[2]):
        scheduler._preempt(sequence, PlanInProgress(0, 0))
    plan = scheduler.schedule()
    pairs = [item.block_copy for item in plan.scheduled if item.block_copy]
    assert len(pairs) == 2
    assert {source for source, _ in pairs} == {choices[1].block_table[1]}


def test_one_that_is_known_to_end_keeps_no_room_from_a_long_prompt() -> None:
    scheduler = make_scheduler(long_prefill_token_threshold=4)
    first = start(scheduler, add(scheduler, request("short", [3], max_tokens=1)))
    long = add(scheduler, request("long", [20]))
    second = scheduler.schedule(first)
    assert [(item.sequence, item.num_tokens) for item in second.scheduled] == [(long, 16)]


def test_nor_does_one_that_waits_for_its_token() -> None:
    scheduler = make_scheduler(long_prefill_token_threshold=4)
    short, long = add(scheduler, request("short", [2])), add(scheduler, request("long", [30]))
    first = start(scheduler, short, long)
    assert [item.num_tokens for item in first.scheduled] == [2, 14]
    scheduler._preempt(short, PlanInProgress(0, 0))
    second = scheduler.schedule(first)
    assert [(item.sequence, item.num_tokens) for item in second.scheduled] == [(long, 16)]
