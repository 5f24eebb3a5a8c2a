"""Continuous batching: what each step computes. Torch-free; the only owner of a sequence's status and counters.

Every step has one budget of tokens. Running sequences that lack one token (decoding) are served first, then
running sequences that lack more (a prompt in chunks), then waiting ones in order of arrival. There are no phases;
chunks of prompts and decodes share a step. Rules that keep it sound:

- A sequence is admitted only when blocks for all its tokens are free, and gets them at once.
- When a running sequence cannot grow, the youngest is preempted: its blocks go back, it waits first in line, and
  is recomputed later. The oldest therefore always advances.
- A chunk ends before a clip whose embeddings cannot be had in this step. New clips are encoded under a budget of
  mel frames a step; they are kept while a sequence needs them (see encoder_cache).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from engine.block_manager import BlockManager
from engine.encoder_cache import EncoderCache
from engine.messages import AudioClip, EngineOutput, EngineStats, FinishReason, TokenLogprobs
from engine.sequence import Sequence, SequenceStatus
from model.config import num_mel_frames

MAX_SPARE = 256
"""Tokens of the answer for which a sequence gets blocks ahead, while memory is plenty."""


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Compute tokens [start, start + num_tokens) of a sequence in this step."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    """Whether the step reaches the last token, so that a new one is sampled."""


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """The plan of one step."""

    scheduled: tuple[ScheduledSequence, ...] = ()
    """Those with one token first: the attention backends count on it."""
    clips_to_encode: tuple[AudioClip, ...] = ()
    evicted_clips: tuple[str, ...] = ()
    """Content hashes whose embeddings the runner may free."""


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What the runner found for a sequence that samples."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None
    """Set when this sequence alone cannot go on (its logits are not numbers, say)."""
    complete: bool = False
    """Whether the answer ends with it because its grammar does."""


@dataclass(slots=True)
class _Step:
    """A plan in the making."""

    tokens_left: int
    frames_left: int
    scheduled: dict[str, ScheduledSequence] = field(default_factory=dict)
    clips: list[AudioClip] = field(default_factory=list)


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
    ) -> None:
        self.blocks = blocks
        self.encoder_cache = encoder_cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_encoder_frames = max_encoder_frames
        self.max_model_len = max_model_len
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of admission."""
        self._sequences: dict[str, Sequence] = {}
        self._num_preemptions = 0
        self._num_steps = 0

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
            num_steps=self._num_steps,
        )

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. Its request id must not be in use."""
        assert sequence.request_id not in self._sequences, "request ids are unique"
        self._sequences[sequence.request_id] = sequence
        self.waiting.append(sequence)

    def knows(self, request_id: str) -> bool:
        """Whether a request of this id is waiting or running."""
        return request_id in self._sequences

    def abort(self, request_id: str) -> None:
        """Forget a request between two steps. Unknown ids are fine: it may just have ended."""
        if sequence := self._sequences.get(request_id):
            self._finish(sequence)

    def schedule(self) -> SchedulerOutput:
        """Plan one step."""
        step = _Step(self.max_num_batched_tokens, self.max_encoder_frames)
        decoding = [sequence for sequence in self.running if sequence.num_missing_tokens == 1]
        prefilling = [sequence for sequence in self.running if sequence.num_missing_tokens > 1]
        for sequence in decoding + prefilling:
            if sequence.status is SequenceStatus.RUNNING:  # it may have been preempted for one before it
                self._schedule_running(sequence, step)
        while self.waiting and self._admit(self.waiting[0], step):
            pass
        self._num_steps += 1
        return SchedulerOutput(
            scheduled=tuple(sorted(step.scheduled.values(), key=lambda item: item.num_tokens > 1)),
            clips_to_encode=tuple(step.clips),
            evicted_clips=self.encoder_cache.take_evicted(),
        )

    def update(
        self, plan: SchedulerOutput, sampled: dict[str, SampledToken], failed_clips: frozenset[str] = frozenset()
    ) -> list[EngineOutput]:
        """Take the step's results in. `sampled` holds one token for each sequence of the plan that samples."""
        outputs = []
        for item in plan.scheduled:
            sequence = item.sequence
            if failed_clips and any(
                clip.content_hash in failed_clips
                for clip in sequence.clips_within(item.start, item.start + item.num_tokens)
            ):
                outputs.append(self._fail(sequence, "the model could not encode this audio"))
                continue
            sequence.num_computed_tokens += item.num_tokens
            self._release_clips(sequence, before=sequence.num_computed_tokens)
            token = sampled.get(sequence.request_id)
            if token is not None:
                outputs.append(self._fail(sequence, token.error) if token.error else self._append(sequence, token))
        for content_hash in failed_clips:
            self.encoder_cache.drop(content_hash)
        return outputs

    def check_integrity(self) -> None:
        """Nothing is lost or held twice. Raises AssertionError."""
        self.blocks.check_integrity(self.running)
        self.encoder_cache.check_integrity({sequence.request_id for sequence in self.running})
        assert set(self._sequences.values()) == {*self.running, *self.waiting}
        assert len(self._sequences) == len(self.running) + len(self.waiting)
        assert all(not sequence.block_table for sequence in self.waiting)

    def _schedule_running(self, sequence: Sequence, step: _Step) -> None:
        num_tokens = self._fit_chunk(sequence, step)
        if num_tokens == 0:
            return
        while not self.blocks.can_allocate(sequence, sequence.num_tokens):
            victim = self.running[-1]
            self._preempt(victim, step)
            if victim is sequence:
                return
        self.blocks.allocate(sequence, sequence.num_tokens)
        self._plan(sequence, num_tokens, step)

    def _admit(self, sequence: Sequence, step: _Step) -> bool:
        """Start the first waiting sequence if it fits. -> whether it did."""
        if len(self.running) >= self.max_num_seqs:
            return False
        if not self.blocks.can_allocate(sequence, sequence.num_tokens):
            return False
        num_tokens = self._fit_chunk(sequence, step)
        if num_tokens == 0:
            return False
        self.waiting.popleft()
        self.running.append(sequence)
        sequence.status = SequenceStatus.RUNNING
        self.blocks.allocate(
            sequence, sequence.num_tokens, spare_tokens=min(sequence.sampling.max_tokens, MAX_SPARE)
        )
        self._plan(sequence, num_tokens, step)
        return True

    def _fit_chunk(self, sequence: Sequence, step: _Step) -> int:
        """How many tokens fit the budgets of tokens and of mel frames. May be 0."""
        start = sequence.num_computed_tokens
        stop = start + min(sequence.num_missing_tokens, step.tokens_left)
        frames_left = step.frames_left
        newly_held: dict[str, int] = {}
        for clip in sequence.clips_within(start, stop):
            if self.encoder_cache.is_held(clip) or clip.content_hash in newly_held:
                continue
            if not self.encoder_cache.has(clip):
                frames_left -= num_mel_frames(len(clip.samples))
            newly_held[clip.content_hash] = clip.num_tokens
            if frames_left < 0 or not self.encoder_cache.can_hold(sum(newly_held.values())):
                return max(0, clip.offset - start)
        return stop - start

    def _plan(self, sequence: Sequence, num_tokens: int, step: _Step) -> None:
        start = sequence.num_computed_tokens
        clips = sequence.clips_within(start, start + num_tokens)
        for clip in sorted(clips, key=self.encoder_cache.has, reverse=True):  # hold before adding evicts
            if not self.encoder_cache.has(clip):
                self.encoder_cache.add(clip)
                step.clips.append(clip)
                step.frames_left -= num_mel_frames(len(clip.samples))
            self.encoder_cache.hold(clip, sequence.request_id)
        step.tokens_left -= num_tokens
        samples = num_tokens == sequence.num_missing_tokens
        step.scheduled[sequence.request_id] = ScheduledSequence(sequence, start, num_tokens, samples)

    def _preempt(self, sequence: Sequence, step: _Step) -> None:
        """Send a running sequence back to the head of the queue; it will be computed again."""
        if item := step.scheduled.pop(sequence.request_id, None):
            step.tokens_left += item.num_tokens
        self.running.remove(sequence)
        self.blocks.free(sequence)
        self._release_clips(sequence)
        sequence.num_computed_tokens = 0
        sequence.status = SequenceStatus.WAITING
        self.waiting.appendleft(sequence)
        self._num_preemptions += 1

    def _append(self, sequence: Sequence, token: SampledToken) -> EngineOutput:
        sequence.token_ids.append(token.token_id)
        sampling = sequence.sampling
        is_stop_token = token.token_id in sampling.stop_token_ids
        stopped = token.complete or (is_stop_token and sequence.num_output_tokens >= sampling.min_tokens)
        full = sequence.num_output_tokens >= sampling.max_tokens or sequence.num_tokens >= self.max_model_len
        reason = FinishReason.STOP if stopped else FinishReason.LENGTH if full else None
        if reason:
            self._finish(sequence)
        return EngineOutput(
            request_id=sequence.request_id,
            new_token_ids=(token.token_id,),
            logprobs=(token.logprobs,) if token.logprobs else (),
            finish_reason=reason,
            stop_token_id=token.token_id if stopped and is_stop_token else None,
        )

    def _fail(self, sequence: Sequence, error: str) -> EngineOutput:
        self._finish(sequence)
        return EngineOutput(sequence.request_id, finish_reason=FinishReason.ERROR, error=error)

    def _finish(self, sequence: Sequence) -> None:
        (self.running if sequence.status is SequenceStatus.RUNNING else self.waiting).remove(sequence)
        self.blocks.free(sequence)
        self._release_clips(sequence)
        sequence.status = SequenceStatus.FINISHED
        del self._sequences[sequence.request_id]

    def _release_clips(self, sequence: Sequence, before: int | None = None) -> None:
        """Let go of the clips that end at or before position `before`; of all of them when None."""
        clips = sequence.request.clips
        inside = {
            clip.content_hash for clip in clips if before and clip.offset < before < clip.offset + clip.num_tokens
        }
        for clip in clips:
            ended = before is None or clip.offset + clip.num_tokens <= before
            if ended and clip.content_hash not in inside:  # the same audio may come twice in one prompt
                self.encoder_cache.release(clip, sequence.request_id)
