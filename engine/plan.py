"""What the scheduler and the runner say to each other: the plan of a step, and what it sampled. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from engine.messages import AudioClip, TokenLogprobs
from engine.sequence import Sequence


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
