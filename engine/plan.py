"""The plan of a step: what the scheduler tells the runner. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil

from engine.messages import AudioClip, SequenceId
from engine.sequence import Sequence
from model.config import num_mel_frames


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Compute tokens [start, start + num_tokens) of a sequence in this step."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    """Whether the step reaches the last token, so that a new one is sampled."""
    block_copy: tuple[int, int] | None = None
    """From block, to block, in all layers, before the step writes: the copied one is this sequence's to write."""
    draft_token_ids: tuple[int, ...] = ()
    """Those of the tokens that are guesses: the last ones, which the sequence does not have yet."""


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """The plan of one step."""

    scheduled: tuple[ScheduledSequence, ...] = ()
    """Those with one token first: the attention backends count on it."""
    clips_to_encode: tuple[AudioClip, ...] = ()
    evicted_clips: tuple[str, ...] = ()
    """Content hashes whose embeddings the runner may free."""

    def note_encoding(self, began: float, seconds: float) -> None:
        """Tell the sequences whose clips were in the step's encoder run when that began and how long it took."""
        hashes = {clip.content_hash for clip in self.clips_to_encode}
        for item in self.scheduled:
            sequence = item.sequence
            clips = sequence.clips_within(item.start, item.start + item.num_tokens)
            if any(clip.content_hash in hashes for clip in clips):
                first, before = sequence.encoding or (began, 0.0)
                sequence.encoding = first, before + seconds


@dataclass(slots=True)
class PlanInProgress:
    """What the scheduler has planned so far, and what is left of the budgets."""

    tokens_left: int
    frames_left: int
    frame_cost: float = 0.0
    scheduled: dict[SequenceId, ScheduledSequence] = field(default_factory=dict)
    clips: list[AudioClip] = field(default_factory=list)

    def cost(self, clip: AudioClip) -> int:
        """Tokens of the budget that encoding the clip takes."""
        return ceil(num_mel_frames(len(clip.samples)) * self.frame_cost)

    def finish(self, evicted_clips: tuple[str, ...]) -> SchedulerOutput:
        """The plan."""
        scheduled = sorted(self.scheduled.values(), key=lambda item: item.num_tokens > 1)
        return SchedulerOutput(tuple(scheduled), tuple(self.clips), evicted_clips)
