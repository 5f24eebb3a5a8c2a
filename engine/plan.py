"""The plan of a step: what the scheduler tells the runner. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from engine.messages import AudioClip
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
