"""Continuous batching: what each step computes. Torch-free; the only owner of a sequence's counters, and with its
queue (sequence_queue) of its status.

Every step has one budget of tokens. Running sequences that lack one token (decoding) are served first, then
running sequences that lack more (a prompt in chunks), then waiting ones in order of rank: priority, arrival, choice.
There are no phases; chunks of prompts and decodes share a step. Rules that keep it sound:

- A sequence is admitted only when blocks for all its tokens are free, and gets them at once.
- When a running sequence cannot grow, the last in rank is preempted: its blocks go back, it waits in its old place,
  and is recomputed later. The first in rank therefore always advances.
- Long prompts leave part of a step to short ones that need it (see long_lane).
- A chunk ends before a clip whose embeddings cannot be had in this step. New clips are encoded under a budget of
  mel frames a step; they are kept while a sequence needs them (see encoder_cache).
- While something decodes, encoding draws on the budget of tokens as well, at `frame_cost` tokens a mel frame, so
  that answers under way wait for a chunk's worth of work. One clip a step is encoded whatever it costs: it cannot be
  cut, so an answer may wait for one clip that is more than what is left.
- A request with n choices is n sequences with one prompt. The first computes it, the others wait meanwhile, and
  `_fork` lets each begin where the prompt ends: it shares the prompt's full blocks and gets a copy of the last one,
  so that nobody writes to what another reads. A fork has no output, hence no state but the prompt's: whoever keeps
  something for each sequence begins anew with it.
- A sequence begins after the blocks that the prefix cache has of it: another's or, after a preemption, its own. They
  are published when a token was sampled after them: logits that are numbers vouch for all they come from.
- A step may be planned before the result of the one before it is known: see `schedule`. What that one samples counts
  as a token whose value is not known yet. A sequence that the result then ends has a wasted place in the plan.
"""

from __future__ import annotations

import time
from dataclasses import replace

from engine.answer import SampledToken, failed, grow, is_full
from engine.block_manager import BlockManager
from engine.encoder_cache import EncoderCache
from engine.long_lane import LongLane
from engine.messages import EngineOutput, EngineStats, FinishReason, SequenceId
from engine.plan import PlanInProgress, ScheduledSequence, SchedulerOutput
from engine.sequence import Sequence, SequenceStatus
from engine.sequence_queue import SequenceQueue, runs
from engine.speculation import NO_SPECULATION, Speculation
from engine.step_sizes import StepSizes
from model.config import num_mel_frames

MAX_SPARE = 256
"""Tokens of the answer for which a sequence gets blocks ahead, while memory is plenty."""


class Scheduler:
    """`schedule`, run the plan, `update`; `add` and `abort` in between."""

    def __init__(
        self,
        blocks: BlockManager,
        encoder_cache: EncoderCache,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_encoder_frames: int,
        max_model_len: int,
        frame_cost: float = 0.0,
        speculation: Speculation = NO_SPECULATION,
        long_prefill_token_threshold: int = 0,
    ) -> None:
        """frame_cost: tokens that take as long to compute as a mel frame to encode (see model.config)."""
        self.blocks = blocks
        self.encoder_cache = encoder_cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_encoder_frames = max_encoder_frames
        self.max_model_len = max_model_len
        self.frame_cost = frame_cost
        self.speculation = speculation
        self._queue = SequenceQueue()
        self.waiting, self.running = self._queue.waiting, self._queue.running
        """Both in order of rank."""
        self._lane = LongLane(long_prefill_token_threshold, max_num_seqs, blocks, self.running, self.waiting)
        self._num_preemptions = 0
        self._step_sizes = StepSizes()
        self._num_looked_up = 0
        self._num_found = 0
        self._assumed: SchedulerOutput | None = None
        """A plan without a result that `schedule` has counted as computed."""

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something."""
        return bool(self.waiting or self.running)

    @property
    def stats(self) -> EngineStats:
        """Counters as of now."""
        return EngineStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            kv_cache_usage=self.blocks.usage,
            num_preemptions=self._num_preemptions,
            num_steps=self._step_sizes.num_steps,
            prefix_cache_queries=self._num_looked_up,
            prefix_cache_hits=self._num_found,
            num_draft_tokens=self.speculation.num_draft_tokens,
            num_accepted_tokens=self.speculation.num_accepted_tokens,
            encoder_cache_queries=self.encoder_cache.num_queries,
            encoder_cache_hits=self.encoder_cache.num_hits,
            num_step_tokens=self._step_sizes.num_tokens,
            step_sizes=tuple(self._step_sizes.counts),
        )

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. A request's choices come one right after the other; its id must not be in use."""
        self._queue.add(sequence)

    def knows(self, request_id: str) -> bool:
        """Whether a request of this id is waiting or running."""
        return self._queue.knows(request_id)

    def abort(self, request_id: str, index: int | None = None) -> list[SequenceId]:
        """Forget a request, or one of its choices, between two steps. -> what was forgotten.

        Unknown ids are fine: it may just have ended.
        """
        choices = self._queue.choices_of(request_id)
        ended = [choice for choice in reversed(choices) if index is None or choice.index == index]
        for sequence in ended:
            self._finish(sequence)
        return [sequence.sequence_id for sequence in ended]

    def schedule(self, in_flight: SchedulerOutput | None = None) -> SchedulerOutput:
        """Plan one step; it may follow on one in flight, whose `update` must come before the next `schedule`."""
        assert self._assumed is None, "one step at most is in flight"
        if in_flight:
            self._assume(in_flight)
        ending = {one for one in self.running if one.num_pending_tokens and is_full(one, self.max_model_len)}
        decoding = [one for one in self.running if one.num_missing_tokens == 1 and one not in ending]
        prefilling = [one for one in self.running if one.num_missing_tokens > 1 and one not in ending]
        step = PlanInProgress(
            self.max_num_batched_tokens, self.max_encoder_frames, self.frame_cost if decoding else 0.0
        )
        self._lane.begin(step.scheduled, ending)
        for sequence in decoding + prefilling:
            if runs(sequence):  # it may have been preempted for one before it
                self._schedule_running(sequence, step)
        self._admit_waiting(step)
        if self.speculation.num_tokens:
            self._plan_drafts(step)
        if step.scheduled:
            self._step_sizes.add(sum(item.num_tokens for item in step.scheduled.values()))
        return step.finish(self.encoder_cache.take_evicted())

    def update(
        self,
        plan: SchedulerOutput,
        sampled: dict[SequenceId, tuple[SampledToken, ...]],
        failed_clips: frozenset[str] = frozenset(),
    ) -> list[EngineOutput]:
        """Take the step's results in. `sampled` holds what each sequence of the plan that samples goes on with.

        That is one token, and one more for each of its first drafts that came true. Sequences that have ended since
        the step was planned are passed over.
        """
        is_assumed, self._assumed = plan is self._assumed, None
        outputs = []
        for sequence in self._readers(failed_clips, with_choices=is_assumed):
            outputs.append(failed(sequence.sequence_id, "the model could not encode this audio"))
            self._finish(sequence)
        for item in plan.scheduled:
            sequence = item.sequence
            if sequence.status is SequenceStatus.FINISHED:
                continue
            sequence.num_pending_tokens = 0
            has_clips = item.start < sequence.end_of_clips
            tokens = sampled.get(sequence.sequence_id)
            output = grow(sequence, tokens, self.max_model_len) if tokens else None
            num_rejected = self.speculation.count_rejected(len(item.draft_token_ids), output)
            sequence.num_computed_tokens += 0 if is_assumed else item.num_tokens - num_rejected
            if has_clips:
                clips = sequence.request.clips
                self.encoder_cache.release(clips, sequence.sequence_id, before=sequence.num_computed_tokens)
            if output:
                if output.finish_reason is not FinishReason.ERROR:
                    self.blocks.publish(sequence, sequence.num_computed_tokens)
                outputs.append(output)
                if output.finish_reason:
                    self._finish(sequence)
        for content_hash in failed_clips:
            self.encoder_cache.drop(content_hash)
        return outputs

    def recompute_all(self) -> None:
        """The steps in flight have failed: compute all that runs again, from what is known for sure."""
        while self.running:
            self._preempt(self.running[-1], PlanInProgress(0, 0))
        for sequence in self.waiting:
            self._reset(sequence)
            sequence.num_pending_tokens = 0
        self.encoder_cache.clear()
        self._assumed = None

    def check_integrity(self) -> None:
        """Nothing is lost or held twice. Raises AssertionError."""
        line = [*self.running, *self.waiting]
        self.blocks.check_integrity(line)
        self.encoder_cache.check_integrity({sequence.sequence_id for sequence in self.running})
        self._queue.check_integrity()
        assert not any(sequence.block_table for sequence in self.waiting), "a sequence that waits holds blocks"

    def _assume(self, plan: SchedulerOutput) -> None:
        """Count a plan in flight as computed."""
        self._assumed = plan
        for item in plan.scheduled:
            assert not item.draft_token_ids, "how many drafts stand is known only from the result"
            if runs(item.sequence):
                item.sequence.num_computed_tokens += item.num_tokens
            if item.sequence.status is not SequenceStatus.FINISHED:
                item.sequence.num_pending_tokens = int(item.samples)

    def _readers(self, content_hashes: frozenset[str], *, with_choices: bool) -> list[Sequence]:
        """Those that need one of these clips now; with the other choices, as they may share what was computed."""
        ids = {holder for content_hash in content_hashes for holder in self.encoder_cache.holders(content_hash)}
        requests = {request_id for request_id, _ in ids} if with_choices else set()
        return [one for one in self.running if one.sequence_id in ids or one.request_id in requests]

    def _schedule_running(self, sequence: Sequence, step: PlanInProgress) -> None:
        num_tokens = self._fit_chunk(sequence, step)
        if num_tokens == 0:
            return
        if sequence.num_tokens > len(sequence.block_table) * self.blocks.block_size:
            while not self.blocks.can_allocate(sequence, sequence.num_tokens):
                victim = self.running[-1]
                self._preempt(victim, step)
                if victim is sequence:
                    return
            self.blocks.allocate(sequence, sequence.num_tokens)
        self._plan(sequence, num_tokens, step)

    def _admit_waiting(self, step: PlanInProgress) -> None:
        """Start waiting sequences until one does not fit, past those whose prompt another is computing."""
        computing: str | None = None
        place = 0  # in line: those before it are passed over
        while place < len(self.waiting) and len(self.running) < self.max_num_seqs and step.tokens_left:
            sequence = self.waiting[place]
            if sequence.num_pending_tokens:  # preempted; to be computed again when all its tokens are known
                return
            if sequence.request_id == computing or self._lane.is_closed_to(sequence):
                place += 1
                continue
            running = [choice for choice in self._queue.choices_of(sequence.request_id) if runs(choice)]
            donor = next((choice for choice in running if _has_prompt(choice, step)), None)
            if running and donor is None:
                computing = sequence.request_id
                place += 1
                continue
            if not self._admit(sequence, donor, step):
                return

    def _admit(self, sequence: Sequence, donor: Sequence | None, step: PlanInProgress) -> bool:
        """Start a waiting sequence if it fits. -> whether it did."""
        num_found = 0 if donor and not sequence.num_output_tokens else self.blocks.reuse(sequence)
        sequence.num_computed_tokens = num_found
        forks = donor is not None and num_found < sequence.num_prompt_tokens
        copied = self._fork(donor, sequence) if donor and forks else None
        num_tokens = self._fit_chunk(sequence, step)
        if num_tokens == 0 or not self.blocks.can_allocate(sequence, sequence.num_tokens):
            self._reset(sequence)
            return False
        if not forks:
            self._num_looked_up += sequence.num_tokens
            self._num_found += num_found
            if sequence.index == 0 and not sequence.num_output_tokens:  # the others find what it has computed
                sequence.num_cached_tokens = num_found
        self._queue.start(sequence)
        sequence.scheduled_at = sequence.scheduled_at or time.monotonic()
        num_shared = len(sequence.block_table)
        self.blocks.allocate(
            sequence, sequence.num_tokens, spare_tokens=min(sequence.sampling.max_tokens, MAX_SPARE)
        )
        block_copy = None if copied is None else (copied, sequence.block_table[num_shared])
        self._plan(sequence, num_tokens, step, block_copy)
        return True

    def _fork(self, donor: Sequence, sequence: Sequence) -> int | None:
        """Let a choice begin at the prompt's last token; that one it computes itself, to sample its first from it.

        -> the donor's block to copy, if the prompt does not end with a full one.
        """
        self.blocks.free(sequence)
        num_computed = sequence.num_prompt_tokens - 1
        num_full, rest = divmod(num_computed, self.blocks.block_size)
        self.blocks.share(donor, sequence, num_full)
        sequence.num_computed_tokens = num_computed
        return donor.block_table[num_full] if rest else None

    def _fit_chunk(self, sequence: Sequence, step: PlanInProgress) -> int:
        """How many tokens fit the budgets of tokens and of mel frames. May be 0."""
        start = sequence.num_computed_tokens
        stop = start + min(sequence.num_missing_tokens, self._lane.limit(sequence, step.tokens_left))
        frames_left, tokens_left = step.frames_left, step.tokens_left
        is_first = not step.clips
        newly_held: dict[str, int] = {}
        for clip in sequence.clips_within(start, stop):
            if clip.offset >= stop:
                break
            if self.encoder_cache.is_held(clip) or clip.content_hash in newly_held:
                continue
            begin = max(start, clip.offset)
            if not self.encoder_cache.has(clip):
                frames_left -= num_mel_frames(len(clip.samples))
                tokens_left -= step.cost(clip)
                stop = min(stop, max(start + tokens_left, begin + is_first))
                is_first = False
            newly_held[clip.content_hash] = clip.num_tokens
            if stop <= begin or frames_left < 0 or not self.encoder_cache.can_hold(sum(newly_held.values())):
                return max(0, clip.offset - start)
        return stop - start

    def _plan(
        self, sequence: Sequence, num_tokens: int, step: PlanInProgress, block_copy: tuple[int, int] | None = None
    ) -> None:
        start = sequence.num_computed_tokens
        clips = sequence.clips_within(start, start + num_tokens)
        for clip in clips and sorted(clips, key=self.encoder_cache.has, reverse=True):  # hold before adding evicts
            if not self.encoder_cache.has(clip):
                self.encoder_cache.add(clip)
                step.clips.append(clip)
                step.frames_left -= num_mel_frames(len(clip.samples))
                step.tokens_left = max(0, step.tokens_left - step.cost(clip))
            self.encoder_cache.hold(clip, sequence.sequence_id)
        step.tokens_left = max(0, step.tokens_left - num_tokens)
        self._lane.take(sequence, num_tokens)
        samples = num_tokens == sequence.num_missing_tokens
        item = ScheduledSequence(sequence, start, num_tokens, samples, block_copy)
        step.scheduled[sequence.sequence_id] = item

    def _plan_drafts(self, step: PlanInProgress) -> None:
        """Let decoding sequences use what the step has left."""
        for key, item in step.scheduled.items():
            if item.samples and item.num_tokens == 1:
                drafts = self.speculation.draft(item.sequence, self.blocks, step.tokens_left)
                step.tokens_left -= len(drafts)
                step.scheduled[key] = replace(item, num_tokens=1 + len(drafts), draft_token_ids=drafts)

    def _preempt(self, sequence: Sequence, step: PlanInProgress) -> None:
        """Send a running sequence back to its place in the queue; it will be computed again."""
        if item := step.scheduled.pop(sequence.sequence_id, None):
            step.tokens_left += item.num_tokens
        self._reset(sequence)
        self._queue.send_back(sequence)
        self._num_preemptions += 1

    def _reset(self, sequence: Sequence) -> None:
        """Nothing of it is computed any more."""
        self.blocks.free(sequence)
        self.encoder_cache.release(sequence.request.clips, sequence.sequence_id)
        sequence.num_computed_tokens = 0

    def _finish(self, sequence: Sequence) -> None:
        self._reset(sequence)
        self._queue.remove(sequence)
        self.speculation.release(sequence)


def _has_prompt(sequence: Sequence, step: PlanInProgress) -> bool:
    """Whether another choice could begin with what the cache holds of it: all but the prompt's last token."""
    item = step.scheduled.get(sequence.sequence_id)
    is_copied = item is not None and item.block_copy is not None  # by this step: too late to be read
    return sequence.num_computed_tokens >= sequence.num_prompt_tokens - 1 and not is_copied
