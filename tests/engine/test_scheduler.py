"""The scheduler with its block manager and encoder cache: a random machine that tries to break it, then plain cases.

The machine plays the runner: it keeps the set of encoded clips and what each slot of the KV cache holds, as the
plans say, and fails as soon as a plan needs what is not there. No torch is imported.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import ceil
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.answer import SampledToken
from engine.block_manager import BlockManager
from engine.encoder_cache import EncoderCache
from engine.messages import AudioClip, EngineOutput, EngineRequest, FinishReason, SamplingParams, SequenceId
from engine.plan import PlanInProgress, ScheduledSequence, SchedulerOutput
from engine.prefix_cache import PrefixCache
from engine.prompt_lookup import PromptLookup
from engine.scheduler import Scheduler
from engine.sequence import Sequence, SequenceStatus
from engine.speculation import Speculation
from model.config import num_audio_tokens, num_mel_frames

STOP = 1
TEXT = 5
BROKEN = "broken"
ROW_BYTES = 10


def clip(num_tokens: int, content_hash: str, offset: int = 0) -> AudioClip:
    samples = np.zeros(640 * num_tokens, dtype=np.float32)
    assert num_audio_tokens(len(samples)) == num_tokens
    return AudioClip(samples, content_hash, offset, num_tokens)


POOL = [clip(num_tokens, f"clip{num_tokens}") for num_tokens in (1, 2, 3, 5, 8, 11)]
CLIPS = {part.content_hash: part for part in POOL}
LARGEST = POOL[-1]


def request(
    request_id: str,
    parts: list[int | AudioClip],
    *,
    n: int = 1,
    priority: int = 0,
    salt: str | None = None,
    **sampling: Any,
) -> EngineRequest:
    """A prompt of runs of text (their lengths) and clips."""
    ids: list[int] = []
    clips = []
    for part in parts:
        if isinstance(part, int):
            ids += [TEXT] * part
        else:
            clips.append(AudioClip(part.samples, part.content_hash, len(ids), part.num_tokens))
            ids += [9] * part.num_tokens
    params = SamplingParams(**{"max_tokens": 4, "stop_token_ids": (STOP,), **sampling})
    return EngineRequest(request_id, tuple(ids), params, tuple(clips), n, priority, salt)


class RandomLookup(PromptLookup):
    """Proposes anything."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.known: set[SequenceId] = set()
        self.random = Random(0)

    def propose(self, sequence: Sequence, num_tokens: int) -> tuple[int, ...]:
        self.known.add(sequence.sequence_id)
        return tuple(self.random.choices([STOP, 2, 3, 4, 6], k=self.random.randint(0, num_tokens)))

    def release(self, sequence_id: SequenceId) -> None:
        self.known.discard(sequence_id)


def make_scheduler(
    lookup: PromptLookup | None = None, num_drafts: int = 0, *, caches: bool = False, **changes: Any
) -> Scheduler:
    sizes: dict[str, Any] = {
        "num_blocks": 32, "block_size": 4, "capacity": 24, "max_num_seqs": 4,
        "max_num_batched_tokens": 16, "max_encoder_frames": num_mel_frames(len(LARGEST.samples)),
        "max_model_len": 40,
    } | changes  # fmt: skip
    size = sizes.pop("block_size")
    cache = PrefixCache(size) if caches else None
    blocks = BlockManager(sizes.pop("num_blocks"), size, cache, sizes.pop("max_kept", None))
    speculation = Speculation(lookup or RandomLookup(), num_drafts, sizes["max_model_len"])
    encoder_cache = EncoderCache(sizes.pop("capacity") * ROW_BYTES, ROW_BYTES)
    return Scheduler(blocks, encoder_cache, **sizes, speculation=speculation)


def add(scheduler: Scheduler, request: EngineRequest) -> Sequence:
    """-> its first choice."""
    return add_choices(scheduler, request)[0]


def add_choices(scheduler: Scheduler, request: EngineRequest) -> list[Sequence]:
    choices = [Sequence(request, seed=0, index=index) for index in range(request.n)]
    for sequence in choices:
        scheduler.add(sequence)
    return choices


def cost(scheduler: Scheduler, plan: SchedulerOutput) -> int:
    """Of a step, in tokens."""
    clips = [ceil(num_mel_frames(len(new.samples)) * scheduler.frame_cost) for new in plan.clips_to_encode]
    return sum(item.num_tokens for item in plan.scheduled) + sum(clips)


def contents(sequence: Sequence) -> list[object]:
    """At each position: the token, or the clip and the place in it."""
    whole: list[object] = list(sequence.token_ids)
    for part in sequence.request.clips:
        span = range(part.num_tokens)
        whole[part.offset : part.offset + part.num_tokens] = [(part.content_hash, row) for row in span]
    return whole


class FakeRunner:
    """Keeps encoded clips as the plans say, and checks every plan against the budgets and the cache."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.clips: dict[str, int] = {}
        self.slots: dict[tuple[int, int], object] = {}
        """(block, offset) -> all that the key and value there depend on (see `contents`)."""
        self.num_computed = 0

    def execute(self, plan: SchedulerOutput) -> None:
        for content_hash in plan.evicted_clips:
            self.clips.pop(content_hash, None)
        for new in plan.clips_to_encode:
            self.clips[new.content_hash] = new.num_tokens
        self._check_cache(plan)
        self._check_budgets(plan)
        self._check_blocks(plan)
        self._copy_blocks(plan)
        self._compute(plan)
        self.num_computed += sum(item.num_tokens for item in plan.scheduled)

    def _check_cache(self, plan: SchedulerOutput) -> None:
        assert sum(self.clips.values()) * ROW_BYTES <= self.scheduler.encoder_cache.capacity
        for item in plan.scheduled:
            for needed in item.sequence.clips_within(item.start, item.start + item.num_tokens):
                assert needed.content_hash in self.clips, "a scheduled placeholder has no embedding"
        for content_hash in self.clips:
            assert self.scheduler.encoder_cache.has(clip(1, content_hash)), "the runner keeps a forgotten clip"

    def _check_budgets(self, plan: SchedulerOutput) -> None:
        scheduler = self.scheduler
        assert len(scheduler.running) <= scheduler.max_num_seqs
        assert sum(item.num_tokens for item in plan.scheduled) <= scheduler.max_num_batched_tokens
        frames = sum(num_mel_frames(len(new.samples)) for new in plan.clips_to_encode)
        assert frames <= scheduler.max_encoder_frames
        lone = [item.num_tokens == 1 for item in plan.scheduled]
        assert lone == sorted(lone, reverse=True), "single tokens come first"

    def _check_blocks(self, plan: SchedulerOutput) -> None:
        size = self.scheduler.blocks.block_size
        written = Counter[int]()
        for item in plan.scheduled:
            sequence = item.sequence
            assert sequence.status is SequenceStatus.RUNNING
            assert sequence in self.scheduler.running
            assert item.num_tokens >= 1
            assert item.start == sequence.num_computed_tokens
            num_drafts = len(item.draft_token_ids)
            assert item.start + item.num_tokens - num_drafts <= sequence.num_tokens
            assert item.samples == (item.start + item.num_tokens - num_drafts == sequence.num_tokens)
            self._check_drafts(sequence, num_drafts, item)
            for position in range(item.start, item.start + item.num_tokens):
                block = sequence.block_table[position // size]
                assert block != 0, "the null block is never written"
                written[block * size + position % size] += 1
        assert not written or max(written.values()) == 1, "two tokens share a slot"

    def _check_drafts(self, sequence: Sequence, num_drafts: int, item: ScheduledSequence) -> None:
        """Only behind a single token, and so few that they and one more fit into the answer."""
        assert num_drafts == 0 or (item.samples and item.num_tokens == 1 + num_drafts)
        if item.samples:
            assert sequence.num_output_tokens + num_drafts + 1 <= sequence.sampling.max_tokens
            assert sequence.num_tokens + num_drafts + 1 <= self.scheduler.max_model_len

    def _copy_blocks(self, plan: SchedulerOutput) -> None:
        pairs = [(item.block_copy, item) for item in plan.scheduled if item.block_copy]
        size = self.scheduler.blocks.block_size
        read = [[self.slots.get((source, offset)) for offset in range(size)] for (source, _), _ in pairs]
        for ((_, target), item), values in zip(pairs, read, strict=True):
            assert target == item.sequence.block_table[item.start // size], "the copy is not where it writes"
            self.slots |= {(target, offset): value for offset, value in enumerate(values)}
        assert len({target for (_, target), _ in pairs}) == len(pairs)

    def _compute(self, plan: SchedulerOutput) -> None:
        """Write all, then read all that came before: what a wrong share or copy would spoil."""
        size = self.scheduler.blocks.block_size

        def slots(item: ScheduledSequence, start: int) -> dict[tuple[int, int], object]:
            sequence = item.sequence
            stop = item.start + item.num_tokens
            whole = [*contents(sequence), *item.draft_token_ids][:stop]
            return {
                (sequence.block_table[position // size], position % size): (
                    sequence.request.cache_salt, *whole[: position + 1]
                )
                for position in range(start, stop)
            }  # fmt: skip

        for item in plan.scheduled:
            self.slots |= slots(item, item.start)
        for item in plan.scheduled:
            for slot, expected in slots(item, 0).items():
                assert self.slots.get(slot) == expected, "a sequence would attend to what is not its own"


class Machine(RuleBasedStateMachine):
    """Requests come, are stepped, fail and go in any order, in pools far too small for them."""

    @initialize(
        block_size=st.integers(1, 5),
        context_blocks=st.integers(4, 10),
        extra_blocks=st.integers(0, 8),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 24),
        capacity=st.integers(LARGEST.num_tokens, 2 * LARGEST.num_tokens),
        extra_frames=st.integers(0, 60),
        caches=st.booleans(),
        max_kept=st.none() | st.integers(0, 6),
        roomy=st.booleans(),
        frame_cost=st.sampled_from([0.0, 0.1, 0.7]),
        num_drafts=st.integers(0, 5),
        threshold=st.integers(0, 12),
    )
    def build(
        self,
        block_size: int,
        context_blocks: int,
        extra_blocks: int,
        max_num_seqs: int,
        budget: int,
        capacity: int,
        extra_frames: int,
        caches: bool,
        max_kept: int | None,
        roomy: bool,
        frame_cost: float,
        num_drafts: int,
        threshold: int,
    ) -> None:
        self.lookup = RandomLookup()
        self.scheduler = make_scheduler(
            self.lookup,
            num_drafts,
            caches=caches,
            max_kept=None if roomy else max_kept,
            num_blocks=2000 if roomy else 1 + context_blocks + extra_blocks,
            block_size=block_size,
            capacity=capacity,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_encoder_frames=num_mel_frames(len(LARGEST.samples)) + extra_frames,
            max_model_len=context_blocks * block_size,
            frame_cost=frame_cost,
            long_prefill_token_threshold=threshold,
        )
        self.runner = FakeRunner(self.scheduler)
        self.requests: dict[str, EngineRequest] = {}
        self.live: dict[SequenceId, Sequence] = {}
        self.given: dict[SequenceId, list[int]] = {}
        self.caches, self.roomy = caches, roomy
        self.good: set[tuple[object, ...]] = set()
        """Beginnings that were computed before a token without error, salt first: all that may be found again."""

    @rule(
        parts=st.lists(st.one_of(st.integers(1, 12), st.sampled_from(sorted(CLIPS))), min_size=1, max_size=5),
        max_tokens=st.integers(1, 12),
        min_tokens=st.integers(0, 3),
        n=st.integers(1, 6),
        priority=st.integers(-1, 1),
        salt=st.sampled_from([None, None, "mine"]),
    )
    def add(
        self, parts: list[int | str], max_tokens: int, min_tokens: int, n: int, priority: int, salt: str | None
    ) -> None:
        """A clip may come twice in a prompt, and in several prompts. Most prompts begin alike."""
        filled = [part if isinstance(part, int) else CLIPS[part] for part in parts]
        made = request("", filled, n=n, priority=priority, salt=salt, max_tokens=max_tokens, min_tokens=min_tokens)
        if len(made.prompt_token_ids) < self.scheduler.max_model_len:
            self.enqueue(made)

    @precondition(lambda self: self.given)
    @rule(data=st.data(), max_tokens=st.integers(1, 6), text=st.integers(1, 4))
    def go_on_with_a_conversation(self, data: st.DataObject, max_tokens: int, text: int) -> None:
        """The prompt and the answer of one before, and some more."""
        before, index = data.draw(st.sampled_from(sorted(self.given)))
        earlier = self.requests[before]
        ids = (*earlier.prompt_token_ids, *self.given[before, index], *[TEXT] * text)
        if len(ids) >= self.scheduler.max_model_len:
            return
        params = replace(earlier.sampling, max_tokens=max_tokens, min_tokens=0)
        self.enqueue(replace(earlier, prompt_token_ids=ids, sampling=params, n=1))

    def enqueue(self, made: EngineRequest) -> None:
        made = replace(made, request_id=f"r{len(self.requests)}")
        self.requests[made.request_id] = made
        for sequence in add_choices(self.scheduler, made):
            self.live[sequence.sequence_id] = sequence
            self.given[sequence.sequence_id] = []

    @precondition(lambda self: self.live)
    @rule(data=st.data(), whole=st.booleans())
    def abort(self, data: st.DataObject, whole: bool) -> None:
        request_id, index = data.draw(st.sampled_from(sorted(self.live)))
        gone = {key for key in self.live if key[0] == request_id} if whole else {(request_id, index)}
        assert set(self.scheduler.abort(request_id, None if whole else index)) == gone
        for key in gone:
            del self.live[key]

    @rule(known=st.sampled_from(["r0", "r1", "never"]), index=st.integers(0, 6))
    def abort_one_that_is_gone(self, known: str, index: int) -> None:
        if (known, index) not in self.live:
            assert self.scheduler.abort(known, index) == []

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        """Of any rank, as if memory had run out."""
        self.scheduler._preempt(data.draw(st.sampled_from(self.scheduler.running)), PlanInProgress(0, 0))

    @rule(
        tokens=st.lists(st.sampled_from([STOP, 2, 3, 4, 6]), min_size=5, max_size=5),
        broken=st.sets(st.integers(0, 4), max_size=1),
        clip_fails=st.booleans(),
    )
    def step_with_failures(self, tokens: list[int], broken: set[int], clip_fails: bool) -> None:
        self.step(tokens, broken, clip_fails)

    @rule(tokens=st.lists(st.sampled_from([2, 3, 4, 6]), min_size=5, max_size=5), count=st.integers(1, 6))
    def run_on(self, tokens: list[int], count: int) -> None:
        for _ in range(count):
            self.step(tokens)

    def step(self, tokens: list[int], broken: set[int] = frozenset(), clip_fails: bool = False) -> None:  # type: ignore[assignment]
        had_work = self.scheduler.has_work
        held = {name for name, part in CLIPS.items() if self.scheduler.encoder_cache.is_held(part)}
        running = [sequence.sequence_id for sequence in self.scheduler.running]
        decodes = any(sequence.num_missing_tokens == 1 for sequence in self.scheduler.running)
        plan = self.scheduler.schedule()
        if decodes:
            assert (
                len(plan.clips_to_encode) == 1 or cost(self.scheduler, plan) <= self.scheduler.max_num_batched_tokens
            )
        self.runner.execute(plan)
        self.check_first(running, plan)
        self.check_found(running, plan)
        assert held.isdisjoint(new.content_hash for new in plan.clips_to_encode), "a clip in use is encoded again"
        assert bool(plan.scheduled) == had_work, "a step with work to do does none"
        sampled, row = {}, 0
        for item in plan.scheduled:
            if item.samples:
                num_accepted = self.lookup.random.randint(0, len(item.draft_token_ids))
                ids = (*item.draft_token_ids[:num_accepted], tokens[row % len(tokens)])
                error = BROKEN if row in broken else None
                sampled[item.sequence.sequence_id] = (
                    *map(SampledToken, ids[:-1]),
                    SampledToken(ids[-1], error=error),
                )
                row += 1
        failed = frozenset(new.content_hash for new in plan.clips_to_encode[:1]) if clip_fails else frozenset()
        spoiled = {
            item.sequence.sequence_id
            for item in plan.scheduled
            for used in item.sequence.clips_within(item.start, item.start + item.num_tokens)
            if used.content_hash in failed
        }
        for content_hash in failed:
            del self.runner.clips[content_hash]
        self.take(self.scheduler.update(plan, sampled, failed), sampled, spoiled)

    def check_first(self, running: list[SequenceId], plan: SchedulerOutput) -> None:
        """Of those that run, the first in rank is never preempted; when it lacks one token, it gets it."""
        if not running:
            return
        first = self.live[running[0]]
        assert first.status is SequenceStatus.RUNNING
        if first.num_missing_tokens == 1 and not first.clips_within(first.num_tokens - 1, first.num_tokens):
            assert first in [item.sequence for item in plan.scheduled]

    def beginning(self, sequence: Sequence, num_blocks: int) -> tuple[object, ...]:
        """The first blocks' contents."""
        return sequence.request.cache_salt, *contents(sequence)[: num_blocks * self.scheduler.blocks.block_size]

    def check_found(self, running: list[SequenceId], plan: SchedulerOutput) -> None:
        """Who starts, starts after what was computed before, and, while nothing is evicted, after all of it."""
        size = self.scheduler.blocks.block_size
        for item in plan.scheduled:
            sequence = item.sequence
            if sequence.sequence_id in running or (sequence.request.n > 1 and item.start % size):
                continue
            num_found = item.start // size
            fork = sequence.request.n > 1 and item.start == sequence.num_prompt_tokens - 1
            assert fork or not num_found or (self.caches and self.beginning(sequence, num_found) in self.good)
            if self.roomy and self.caches and not fork and item.start + 1 < sequence.num_tokens:
                following = self.beginning(sequence, num_found + 1)
                assert (num_found + 1) * size >= sequence.num_tokens or following not in self.good

    def take(
        self,
        outputs: list[EngineOutput],
        sampled: dict[SequenceId, tuple[SampledToken, ...]],
        spoiled: set[SequenceId],
    ) -> None:
        """Every sampled token comes out once, up to the end, and every end is for the reason that it should be."""
        assert {output.sequence_id for output in outputs} == sampled.keys() | spoiled
        assert len(outputs) == len({output.sequence_id for output in outputs})
        for output in outputs:
            sequence = self.live[output.sequence_id]
            given = self.given[output.sequence_id]
            new, expected = self.expect(sequence, sampled.get(output.sequence_id, ()))
            if output.sequence_id in spoiled or expected is FinishReason.ERROR:
                assert output.finish_reason is FinishReason.ERROR
                assert output.error
                assert not output.new_token_ids
            else:
                assert list(output.new_token_ids) == new
                for count in range(1, (sequence.num_tokens - 1) // self.scheduler.blocks.block_size + 1):
                    self.good.add(self.beginning(sequence, count))
                given += new
                assert sequence.token_ids[sequence.num_prompt_tokens :] == given, "a preemption lost a token"
                assert output.finish_reason is expected
                assert output.stop_token_id == (STOP if expected is FinishReason.STOP else None)
            if output.finish_reason is not None:
                del self.live[output.sequence_id]
                assert sequence.status is SequenceStatus.FINISHED
        known = {request_id for request_id, _ in self.live}
        assert all(self.scheduler.knows(output.request_id) == (output.request_id in known) for output in outputs)

    def expect(self, sequence: Sequence, tokens: tuple[SampledToken, ...]) -> tuple[list[int], FinishReason | None]:
        """-> the tokens up to the end of the answer, and how it ends."""
        num_given = len(self.given[sequence.sequence_id])
        for count, token in enumerate(tokens, 1):
            num_output = num_given + count
            num_tokens = sequence.num_prompt_tokens + num_output
            if token.error:
                return [], FinishReason.ERROR
            new = [token.token_id for token in tokens[:count]]
            if token.token_id == STOP and num_output >= sequence.sampling.min_tokens:
                return new, FinishReason.STOP
            if num_output >= sequence.sampling.max_tokens or num_tokens >= self.scheduler.max_model_len:
                return new, FinishReason.LENGTH
        return [token.token_id for token in tokens], None

    @invariant()
    def nothing_is_lost_or_held_twice(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            assert {s.sequence_id for s in (*self.scheduler.running, *self.scheduler.waiting)} == self.live.keys()
            assert self.lookup.known <= self.live.keys()

    @invariant()
    def first_come_is_first_served(self) -> None:
        if hasattr(self, "scheduler"):
            for line in (self.scheduler.running, self.scheduler.waiting):
                order = [sequence.rank for sequence in line]
                assert order == sorted(order)

    @invariant()
    def a_sequence_inside_a_clip_holds_it(self) -> None:
        for sequence in self.scheduler.running if hasattr(self, "scheduler") else []:
            done = sequence.num_computed_tokens
            for part in sequence.request.clips:
                if part.offset < done < part.offset + part.num_tokens:
                    holders = self.scheduler.encoder_cache._entries[part.content_hash].holders
                    assert sequence.sequence_id in holders

    def teardown(self) -> None:
        """Whatever is left ends in a bounded number of steps, and everything goes back."""
        if not hasattr(self, "scheduler"):
            return
        left = sum(sequence.num_tokens + sequence.sampling.max_tokens for sequence in self.live.values())
        for _ in range(2 * left + 1):
            if not self.scheduler.has_work:
                break
            self.step([2])
            self.nothing_is_lost_or_held_twice()
            self.first_come_is_first_served()
            self.a_sequence_inside_a_clip_holds_it()
        assert not self.live, "requests starve"
        assert self.scheduler.blocks.usage == 0.0
        assert not any(self.scheduler.encoder_cache.is_held(part) for part in POOL)


Machine.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestMachine = Machine.TestCase


def run(scheduler: Scheduler, runner: FakeRunner, token: int = 2) -> tuple[SchedulerOutput, list[EngineOutput]]:
    """One step in which every sequence that samples gets `token`."""
    plan = scheduler.schedule()
    runner.execute(plan)
    sampled = {item.sequence.sequence_id: (SampledToken(token),) for item in plan.scheduled if item.samples}
    outputs = scheduler.update(plan, sampled)
    scheduler.check_integrity()
    return plan, outputs


def shape(plan: SchedulerOutput) -> dict[str, tuple[int, int]]:
    return {item.sequence.request_id: (item.start, item.num_tokens) for item in plan.scheduled}


def test_decodes_and_chunks_of_prompts_share_a_step() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16)
    runner = FakeRunner(scheduler)
    add(scheduler, request("a", [6]))
    assert shape(run(scheduler, runner)[0]) == {"a": (0, 6)}
    add(scheduler, request("b", [20]))
    add(scheduler, request("c", [3]))
    assert shape(run(scheduler, runner)[0]) == {"a": (6, 1), "b": (0, 15)}
    assert shape(run(scheduler, runner)[0]) == {"a": (7, 1), "b": (15, 5), "c": (0, 3)}


def test_the_youngest_is_preempted_and_recomputed_with_its_output() -> None:
    scheduler = make_scheduler(num_blocks=5, block_size=4, max_model_len=16)
    runner = FakeRunner(scheduler)
    old = add(scheduler, request("old", [7], max_tokens=9))
    young = add(scheduler, request("young", [7], max_tokens=9))
    run(scheduler, runner)
    run(scheduler, runner)  # both hold 8 tokens in 2 blocks now, and no block is free
    plan, _ = run(scheduler, runner)
    assert shape(plan) == {"old": (8, 1)}
    assert list(scheduler.waiting) == [young]
    assert (young.num_computed_tokens, young.block_table, young.num_output_tokens) == (0, [], 2)
    assert scheduler.stats.num_preemptions == 1
    while old.status is not SequenceStatus.FINISHED:
        assert "young" not in shape(run(scheduler, runner)[0])
    assert shape(run(scheduler, runner)[0]) == {"young": (0, 9)}


def test_a_chunk_ends_before_a_clip_that_the_frame_budget_cannot_take() -> None:
    frames = num_mel_frames(len(LARGEST.samples))
    scheduler = make_scheduler(max_encoder_frames=frames, max_num_batched_tokens=64, capacity=100)
    runner = FakeRunner(scheduler)
    add(scheduler, request("a", [2, LARGEST, 3, POOL[0], 2]))
    plan, _ = run(scheduler, runner)
    assert shape(plan) == {"a": (0, 16)}
    assert [new.content_hash for new in plan.clips_to_encode] == [LARGEST.content_hash]
    plan, _ = run(scheduler, runner)
    assert shape(plan) == {"a": (16, 3)}


@pytest.mark.parametrize("decodes", [False, True])
def test_while_something_decodes_encoding_counts_as_tokens(decodes: bool) -> None:
    """Clips of 44 frames at half a token each, a budget of 64: 1 + (22 + 12) + (22 + 7)."""
    scheduler = make_scheduler(
        max_num_batched_tokens=64,
        max_encoder_frames=1000,
        capacity=100,
        num_blocks=64,
        frame_cost=0.5,
        max_num_seqs=9,
    )
    runner = FakeRunner(scheduler)
    if decodes:
        add(scheduler, request("decodes", [1], max_tokens=20))
        run(scheduler, runner)
    for index in range(4):
        add(scheduler, request(f"r{index}", [clip(11, f"new {index}"), 1]))
    plan, _ = run(scheduler, runner)
    if not decodes:
        assert len(plan.clips_to_encode) == 4
        return
    assert shape(plan) == {"decodes": (1, 1), "r0": (0, 12), "r1": (0, 7)}
    assert cost(scheduler, plan) == 64


def test_a_clip_that_costs_more_than_a_chunk_is_encoded_alone() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8, max_encoder_frames=1000, frame_cost=0.5)
    runner = FakeRunner(scheduler)
    add(scheduler, request("decodes", [1], max_tokens=20))
    run(scheduler, runner)
    for name in "ab":
        add(scheduler, request(name, [clip(5, name), 1], max_tokens=1))
    assert shape(run(scheduler, runner)[0]) == {"decodes": (1, 1), "a": (0, 1)}
    assert shape(run(scheduler, runner)[0]) == {"decodes": (2, 1), "a": (1, 5), "b": (0, 1)}
    assert shape(run(scheduler, runner)[0]) == {"decodes": (3, 1), "b": (1, 5)}


def test_the_same_clip_is_encoded_once_for_all_who_bring_it() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=64, num_blocks=64)
    runner = FakeRunner(scheduler)
    for name in ("a", "b", "c"):
        add(scheduler, request(name, [1, POOL[3], 2, POOL[3]]))
    plan, _ = run(scheduler, runner)
    assert len(plan.scheduled) == 3
    assert [new.content_hash for new in plan.clips_to_encode] == [POOL[3].content_hash]


def test_a_clip_stays_until_room_is_needed_and_the_longest_unused_goes_first() -> None:
    scheduler = make_scheduler(capacity=13, max_num_batched_tokens=64)
    runner = FakeRunner(scheduler)
    for name, part in (("a", POOL[3]), ("b", POOL[4])):
        add(scheduler, request(name, [part, 1], max_tokens=1))
        run(scheduler, runner)
    add(scheduler, request("c", [POOL[3], 1], max_tokens=1))
    plan, _ = run(scheduler, runner)
    assert not plan.clips_to_encode
    add(scheduler, request("d", [POOL[1], 1], max_tokens=1))
    plan, _ = run(scheduler, runner)
    assert plan.evicted_clips == (POOL[4].content_hash,)


def test_a_clip_that_fails_ends_its_sequences_and_may_be_tried_again() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=64)
    runner = FakeRunner(scheduler)
    for name, parts in (("a", [POOL[3], 1]), ("b", [2]), ("c", [1, POOL[3], 1])):
        add(scheduler, request(name, parts))
    plan = scheduler.schedule()
    runner.execute(plan)
    sampled = {(name, 0): (SampledToken(2),) for name in ("a", "b", "c")}
    outputs = scheduler.update(plan, sampled, frozenset({POOL[3].content_hash}))
    assert {o.request_id: o.finish_reason for o in outputs} == {
        "a": FinishReason.ERROR,
        "b": None,
        "c": FinishReason.ERROR,
    }
    scheduler.check_integrity()
    add(scheduler, request("d", [POOL[3], 1]))
    plan = scheduler.schedule()
    assert [new.content_hash for new in plan.clips_to_encode] == [POOL[3].content_hash]


def test_stop_tokens_count_only_from_min_tokens_on() -> None:
    scheduler = make_scheduler()
    runner = FakeRunner(scheduler)
    add(scheduler, request("a", [3], min_tokens=2, max_tokens=9))
    _, (first,) = run(scheduler, runner, STOP)
    assert (first.finish_reason, first.stop_token_id) == (None, None)
    _, (second,) = run(scheduler, runner, STOP)
    assert (second.finish_reason, second.stop_token_id, second.new_token_ids) == (FinishReason.STOP, STOP, (STOP,))


def test_a_full_context_ends_an_answer() -> None:
    scheduler = make_scheduler(max_model_len=6)
    runner = FakeRunner(scheduler)
    add(scheduler, request("a", [4], max_tokens=99))
    assert [run(scheduler, runner)[1][0].finish_reason for _ in range(2)] == [None, FinishReason.LENGTH]


@pytest.mark.parametrize("running", [False, True])
def test_an_abort_gives_everything_back(running: bool) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    runner = FakeRunner(scheduler)
    add(scheduler, request("a", [2, LARGEST, 2]))
    if running:
        run(scheduler, runner)
        assert scheduler.blocks.usage > 0
        assert scheduler.encoder_cache.is_held(LARGEST)
    scheduler.abort("a")
    scheduler.check_integrity()
    assert scheduler.blocks.usage == 0
    assert not scheduler.encoder_cache.is_held(LARGEST)
    assert not scheduler.has_work
    add(scheduler, request("a", [2]))  # its id is free again
    assert shape(run(scheduler, runner)[0]) == {"a": (0, 2)}


def test_blocks_come_in_runs_and_return_to_the_lowest() -> None:
    blocks = BlockManager(num_blocks=12, block_size=2)
    first, second, third = (Sequence(request(name, [6]), seed=0) for name in "abc")
    blocks.allocate(first, 6)
    blocks.allocate(second, 4)
    assert (first.block_table, second.block_table) == ([1, 2, 3], [4, 5])
    blocks.free(first)
    blocks.allocate(third, 8)
    assert third.block_table == [6, 7, 8, 9]  # the hole is too short
    blocks.allocate(second, 6)
    assert second.block_table == [4, 5, 1]  # what follows is taken: any block will do
    assert not blocks.can_allocate(first, 10)
    assert blocks.can_allocate(first, 8)


def test_spare_blocks_are_given_only_while_memory_is_plenty() -> None:
    blocks = BlockManager(num_blocks=9, block_size=2)
    first, second = (Sequence(request(name, [6]), seed=0) for name in "ab")
    blocks.allocate(first, 2, spare_tokens=6)
    blocks.allocate(second, 2, spare_tokens=2)
    assert (first.block_table, second.block_table) == ([1, 2, 3, 4], [5])
    blocks.allocate(first, 8)
    assert first.block_table == [1, 2, 3, 4]


def test_forks_share_full_blocks_and_copy_the_last() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=64)
    runner = FakeRunner(scheduler)
    first, second, third = add_choices(scheduler, request("a", [10], n=3, max_tokens=2))
    assert shape(run(scheduler, runner)[0]) == {"a": (0, 10)}  # the others wait for the prompt
    plan, _ = run(scheduler, runner)
    assert [(item.start, item.num_tokens) for item in plan.scheduled] == [(10, 1), (9, 1), (9, 1)]
    assert second.block_table[:2] == third.block_table[:2] == [1, 2]
    last = second.block_table[2], third.block_table[2]
    assert [item.block_copy for item in plan.scheduled] == [None, (3, last[0]), (3, last[1])]
    assert first.status is SequenceStatus.FINISHED
    assert len({3, *last}) == 3
    while scheduler.has_work:
        run(scheduler, runner)
    assert runner.num_computed == 10 + 2 + 3 * 1
    assert scheduler.blocks.usage == 0


def test_nobody_forks_from_a_block_that_this_very_step_copies() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=64)
    runner = FakeRunner(scheduler)
    choices = add_choices(scheduler, request("a", [10], n=3, max_tokens=9))
    run(scheduler, runner)
    run(scheduler, runner)
    for choice in choices[:2]:
        scheduler._preempt(choice, PlanInProgress(0, 0))
    plan, _ = run(scheduler, runner)
    copies = [item.block_copy for item in plan.scheduled if item.block_copy]
    assert [source for source, _ in copies] == [choices[2].block_table[2]] * 2


@pytest.mark.parametrize("length", [1, 9])
def test_a_fork_whose_last_block_holds_one_token_copies_nothing(length: int) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=64)
    runner = FakeRunner(scheduler)
    add_choices(scheduler, request("a", [length], n=2))
    run(scheduler, runner)
    plan, _ = run(scheduler, runner)
    assert [item.block_copy for item in plan.scheduled] == [None, None]


def test_a_choice_that_waits_for_a_slot_finds_the_prompt_and_computes_the_rest_of_a_block() -> None:
    scheduler = make_scheduler(caches=True, max_num_seqs=1, max_num_batched_tokens=64)
    runner = FakeRunner(scheduler)
    choices = add_choices(scheduler, request("a", [11], n=3, max_tokens=1))
    for start in (0, 8, 8):
        assert shape(run(scheduler, runner)[0]) == {"a": (start, 11 - start)}
    assert all(choice.status is SequenceStatus.FINISHED for choice in choices)
    assert scheduler.blocks.usage == 0


@pytest.mark.parametrize("ended", [1, 2])
def test_a_kept_prompt_passes_to_the_next_choice(ended: int) -> None:
    scheduler = make_scheduler(caches=True, max_num_seqs=1, max_num_batched_tokens=64)
    runner = FakeRunner(scheduler)
    add_choices(scheduler, request("a", [11], n=3, max_tokens=1))
    run(scheduler, runner)
    assert scheduler.abort("a", ended) == [("a", ended)]
    scheduler.check_integrity()
    assert shape(run(scheduler, runner)[0]) == {"a": (8, 3)}
    assert not scheduler.has_work
    assert scheduler.blocks.usage == 0


def test_a_kept_prompt_is_given_up_before_anybody_is_preempted() -> None:
    scheduler = make_scheduler(
        caches=True, num_blocks=7, max_num_seqs=1, max_num_batched_tokens=64, max_model_len=24
    )
    runner = FakeRunner(scheduler)
    add_choices(scheduler, request("a", [9], n=2, max_tokens=1))
    run(scheduler, runner)
    add(scheduler, request("b", [POOL[0], 14], max_tokens=8, priority=-1))
    assert shape(run(scheduler, runner)[0]) == {"b": (0, 15)}
    while len(scheduler.running) == 1 and scheduler.running[0].request_id == "b":
        run(scheduler, runner)
    assert shape(run(scheduler, runner)[0]) == {"a": (0, 9)}
    assert scheduler.stats.num_preemptions == 0
    assert scheduler.blocks.usage == 0


def test_other_requests_do_not_wait_for_a_prompt_that_choices_wait_for() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    runner = FakeRunner(scheduler)
    add_choices(scheduler, request("a", [7], n=3))
    add(scheduler, request("b", [1]))
    assert shape(run(scheduler, runner)[0]) == {"a": (0, 7), "b": (0, 1)}


def test_a_long_prompt_leaves_half_of_each_step_to_short_ones() -> None:
    scheduler = make_scheduler(num_blocks=64, max_model_len=64, max_num_batched_tokens=16, max_num_seqs=8,
                               long_prefill_token_threshold=10)  # fmt: skip
    runner = FakeRunner(scheduler)
    add(scheduler, request("long", [50]))
    assert shape(run(scheduler, runner)[0]) == {"long": (0, 16)}  # nobody else is there
    for name in "abc":
        add(scheduler, request(name, [5], max_tokens=1))
    assert shape(run(scheduler, runner)[0]) == {"long": (16, 8), "a": (0, 5), "b": (0, 3)}
    assert shape(run(scheduler, runner)[0]) == {"long": (24, 8), "b": (3, 2), "c": (0, 5)}
    assert shape(run(scheduler, runner)[0]) == {"long": (32, 16)}
    assert shape(run(scheduler, runner)[0]) == {"long": (48, 2)}


def test_long_prompts_share_one_lane_in_order_of_rank_and_are_passed_by_short_ones() -> None:
    scheduler = make_scheduler(num_blocks=64, max_model_len=64, max_num_batched_tokens=16, max_num_seqs=8,
                               long_prefill_token_threshold=10)  # fmt: skip
    runner = FakeRunner(scheduler)
    for name, length in (("first", 30), ("second", 30), ("short", 5)):
        add(scheduler, request(name, [length], max_tokens=1))
    assert shape(run(scheduler, runner)[0]) == {"first": (0, 8), "short": (0, 5)}
    assert shape(run(scheduler, runner)[0]) == {"first": (8, 16)}
    assert shape(run(scheduler, runner)[0]) == {"first": (24, 6), "second": (0, 10)}


@pytest.mark.parametrize(
    ("priority", "expected"),
    [
        (-1, {"long": (16, 16)}),
        (0, {"long": (16, 8), "equal": (0, 3)}),
        (1, {"long": (16, 8), "equal": (0, 3), "later": (0, 3)}),
    ],
)
def test_what_a_long_prompt_leaves_is_not_for_those_behind_it_in_priority(
    priority: int, expected: dict[str, tuple[int, int]]
) -> None:
    scheduler = make_scheduler(
        num_blocks=64,
        max_model_len=64,
        max_num_batched_tokens=16,
        max_num_seqs=8,
        long_prefill_token_threshold=10,
    )
    runner = FakeRunner(scheduler)
    add(scheduler, request("long", [40], priority=priority))
    run(scheduler, runner)
    add(scheduler, request("equal", [3], max_tokens=1))
    add(scheduler, request("later", [3], max_tokens=1, priority=1))
    assert shape(run(scheduler, runner)[0]) == expected


def test_a_short_prompt_that_could_not_start_holds_no_long_one_back() -> None:
    scheduler = make_scheduler(num_blocks=11, max_model_len=40, max_num_batched_tokens=16, max_num_seqs=8,
                               long_prefill_token_threshold=10)  # fmt: skip
    runner = FakeRunner(scheduler)
    add(scheduler, request("long", [37]))
    run(scheduler, runner)
    add(scheduler, request("short", [9]))  # all blocks are taken
    assert shape(run(scheduler, runner)[0]) == {"long": (16, 16)}


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(20, 60),
    threshold=st.integers(10, 19),
    budget=st.integers(2, 24),
    arrivals=st.lists(st.integers(1, 10), min_size=1, max_size=4),
    num_long=st.integers(1, 3),
)
def test_neither_long_nor_short_prompts_starve_while_more_and_more_arrive(
    length: int, threshold: int, budget: int, arrivals: list[int], num_long: int
) -> None:
    """Short ones come with each step and end in order; long ones end as if a quarter of each step were theirs.

    They have half of what a step has left behind those that lack a single token, which may be half of it.
    """
    scheduler = make_scheduler(
        num_blocks=400,
        max_model_len=64,
        max_num_batched_tokens=budget,
        max_num_seqs=64,
        long_prefill_token_threshold=threshold,
    )
    runner = FakeRunner(scheduler)
    for number in range(num_long):
        add(scheduler, request(f"long {number}", [length], max_tokens=1))
    ended: list[str] = []
    bound = num_long * -(-length // max(1, budget // 4)) + 1
    for step in range(bound):
        for number, tokens in enumerate(arrivals):
            add(scheduler, request(f"short {step:03} {number}", [tokens], max_tokens=1))
        _, outputs = run(scheduler, runner)
        ended += sorted(output.request_id for output in outputs)
    for kind in ("long", "short"):
        served = [name for name in ended if name.startswith(kind)]
        assert served == sorted(served)
    assert sum(name.startswith("long") for name in ended) == num_long
    assert any(name.startswith("short") for name in ended)


@pytest.mark.parametrize("spoil", ["lose", "share", "null"])
def test_check_integrity_sees_a_wrong_block(spoil: str) -> None:
    blocks = BlockManager(num_blocks=8, block_size=2)
    sequences = [Sequence(request(name, [6]), seed=0) for name in "ab"]
    for sequence in sequences:
        blocks.allocate(sequence, 4)
    blocks.check_integrity(sequences)
    if spoil == "lose":
        sequences[0].block_table.pop()
    else:
        sequences[0].block_table[0] = sequences[1].block_table[0] if spoil == "share" else 0
    with pytest.raises(AssertionError):
        blocks.check_integrity(sequences)
