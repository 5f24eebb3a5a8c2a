"""Fairness between a long prompt and many short ones: what of a step the long ones may take. Torch-free.

A sequence that lacks more than `threshold` tokens is long. While a short one that is not behind it in priority lacks
tokens too and could be computed, the long ones get, all together, at most half of what the step has left when their
turn comes; among themselves they go in order of rank. So the first in rank always advances, whatever it lacks, and
short ones have half of a step at least. What a long one is denied goes to nobody of a lower priority.

Knows nothing of clips, and changes no sequence: the scheduler does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from collections.abc import Sequence as Line
from itertools import islice

from engine.block_manager import BlockManager
from engine.messages import SequenceId
from engine.sequence import Sequence

SHARE = 0.5
"""Of a step, for all long sequences, while short ones need it."""


class LongLane:
    """`begin` with each step; then ask for each sequence that is planned."""

    def __init__(
        self,
        threshold: int,
        max_num_seqs: int,
        blocks: BlockManager,
        running: Line[Sequence],
        waiting: Line[Sequence],
    ) -> None:
        """The two lines are the scheduler's own, in order of rank. threshold 0: there are no long ones."""
        self.threshold = threshold
        self.max_num_seqs = max_num_seqs
        self._blocks = blocks
        self._running = running
        self._waiting = waiting
        self._scheduled: Collection[SequenceId] = ()
        self._ending: Collection[Sequence] = ()
        self._tokens_left: int | None = None
        """Of the lane; None: no long one has been held back in this step."""
        self._priority = 0
        """Of the first one held back."""

    def begin(self, scheduled: Collection[SequenceId], ending: Collection[Sequence] = ()) -> None:
        """A new step. `scheduled` grows with it: those that have their place; `ending` run, and need none."""
        self._scheduled = scheduled
        self._ending = ending
        self._tokens_left = None

    def limit(self, sequence: Sequence, tokens_left: int) -> int:
        """How many of the step's `tokens_left` a sequence may take: at least 1 of any for the first long one."""
        if self._tokens_left is not None and sequence.request.priority > self._priority:
            return 0
        if not self._is_long(sequence):
            return tokens_left
        if self._tokens_left is None and any(self._is_rival(other, sequence) for other in self._in_need()):
            self._tokens_left = max(min(1, tokens_left), int(SHARE * tokens_left))
            self._priority = sequence.request.priority
        return tokens_left if self._tokens_left is None else min(self._tokens_left, tokens_left)

    def take(self, sequence: Sequence, num_tokens: int) -> None:
        """A sequence was given so many."""
        if self._tokens_left is not None and self._is_long(sequence):
            self._tokens_left -= num_tokens

    def is_closed_to(self, sequence: Sequence) -> bool:
        """Whether it is long and the lane is used up: others may pass it."""
        return self._tokens_left == 0 and self._is_long(sequence)

    def _is_long(self, sequence: Sequence) -> bool:
        return 0 < self.threshold < sequence.num_missing_tokens

    def _is_rival(self, other: Sequence, sequence: Sequence) -> bool:
        return other.request.priority <= sequence.request.priority and not self._is_long(other)

    def _in_need(self) -> Iterator[Sequence]:
        """Those that have no place in the step yet and may get one."""
        for sequence in self._running:
            if sequence.sequence_id not in self._scheduled and sequence not in self._ending:
                yield sequence
        for sequence in islice(self._waiting, max(0, self.max_num_seqs - len(self._running))):
            if sequence.num_pending_tokens:  # nobody is admitted before all its tokens are known
                return
            if self._blocks.can_allocate(sequence, sequence.num_tokens):
                yield sequence
