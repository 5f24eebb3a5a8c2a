"""When the engine did what for a request, and the counters that its snapshots carry."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import answer, scheduler
from engine.answer import SampledToken
from engine.messages import RequestTimes
from engine.plan import SchedulerOutput
from engine.step_sizes import STEP_SIZE_BOUNDS, StepSizes

from .test_scheduler import CLIPS, FakeRunner, add, add_choices, make_scheduler, request, run


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of everything but a sequence's arrival."""
    clock = Clock()
    for module in (answer, scheduler):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_the_first_output_tells_when_each_part_was_reached(clock: Clock) -> None:
    busy = make_scheduler(max_num_batched_tokens=8)
    runner = FakeRunner(busy)
    one = add(busy, request("a", [4, CLIPS["clip5"], 11], max_tokens=3))
    outputs = []
    for _ in range(5):
        plan = busy.schedule()
        runner.execute(plan)
        if plan.clips_to_encode:
            plan.note_encoding(clock.now + 0.5, 0.25)
        sampled = {item.sequence.sequence_id: (SampledToken(2),) for item in plan.scheduled if item.samples}
        outputs += busy.update(plan, sampled)
        clock.now += 1
    first, second, third = outputs
    assert first.times == RequestTimes(one.queued_at, 1, (1.5, 0.25), 3), "chunks of 8: the last ends in the third"
    assert second.times is third.times is None


def test_without_clips_nothing_is_encoded(clock: Clock) -> None:
    busy = make_scheduler()
    runner = FakeRunner(busy)
    add(busy, request("a", [4]))
    [output] = run(busy, runner)[1]
    assert output.times is not None
    assert output.times.encoding is None


def test_a_clip_that_others_brought_costs_nothing_and_a_second_run_is_added(clock: Clock) -> None:
    busy = make_scheduler()
    runner = FakeRunner(busy)
    one, two = (add(busy, request(name, [1, CLIPS["clip5"], 2, CLIPS["clip3"]])) for name in "ab")
    plan = busy.schedule()
    runner.execute(plan)
    plan.note_encoding(3.0, 0.5)
    plan.note_encoding(4.0, 0.25)
    assert one.encoding == (3.0, 0.75)
    assert two.encoding in (None, (3.0, 0.75)), "in this step or in none"
    later = SchedulerOutput(plan.scheduled)
    later.note_encoding(5.0, 1.0)
    assert one.encoding == (3.0, 0.75)


def test_a_preempted_answer_keeps_its_first_moments(clock: Clock) -> None:
    busy = make_scheduler(num_blocks=5, max_num_batched_tokens=32)
    runner = FakeRunner(busy)
    add(busy, request("a", [7], max_tokens=12))
    add(busy, request("b", [7], max_tokens=12))
    told = []
    for _ in range(40):
        told += [output for output in run(busy, runner)[1] if output.times]
        clock.now += 1
    assert busy.stats.num_preemptions > 0
    assert [output.request_id for output in told] == ["a", "b"]
    assert all(output.times and output.times.scheduled == 1 for output in told)


def test_every_choice_has_times_of_its_own(clock: Clock) -> None:
    busy = make_scheduler()
    runner = FakeRunner(busy)
    add_choices(busy, request("a", [5], n=2))
    told = [output for _ in range(3) for output in run(busy, runner)[1] if output.times]
    assert sorted(output.index for output in told) == [0, 1]


def test_encoder_cache_lookups_are_counted() -> None:
    busy = make_scheduler(max_num_batched_tokens=4)
    runner = FakeRunner(busy)
    for name in ("a", "b"):
        add(busy, request(name, [1, CLIPS["clip5"], 1, CLIPS["clip2"]], max_tokens=1))
        for _ in range(6):
            run(busy, runner)
    assert not busy.has_work
    assert (busy.stats.encoder_cache_queries, busy.stats.encoder_cache_hits) == (4, 2)


def test_steps_are_counted_by_size() -> None:
    busy = make_scheduler(max_num_batched_tokens=8)
    runner = FakeRunner(busy)
    add(busy, request("a", [11], max_tokens=3))
    while busy.has_work:
        run(busy, runner)
    stats = busy.stats
    assert (stats.num_steps, stats.num_step_tokens) == (4, 8 + 3 + 1 + 1)
    assert stats.step_sizes[:5] == (2, 0, 1, 1, 0)


@given(st.lists(st.integers(1, 40_000)))
def test_sizes_fall_under_the_least_bound_that_holds_them(sizes: list[int]) -> None:
    counted = StepSizes()
    for size in sizes:
        counted.add(size)
    for index, bound in enumerate(STEP_SIZE_BOUNDS):
        assert sum(counted.counts[: index + 1]) == sum(size <= bound for size in sizes)
    assert (counted.num_steps, counted.num_tokens) == (len(sizes), sum(sizes))
