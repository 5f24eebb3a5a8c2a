"""Who owns which block of the paged KV cache (Kwon et al. 2023). Torch-free bookkeeping: no tensor is touched.

A block holds the keys and values of `block_size` consecutive tokens of one sequence. Block 0 is never given out:
padding points at it. Any block serves, but consecutive ones serve better: a CPU then attends over the cache in place
instead of gathering (see model/attention/reference.py). So a sequence gets a run of blocks where there is one, some
spare blocks to grow into while memory is plenty, and the lowest run first, so that memory once touched is reused.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from engine.sequence import Sequence

NULL_BLOCK = 0
PLENTY = 0.5
"""Share of the blocks that must stay free for spare ones to be given."""


class BlockManager:
    """Gives blocks to sequences and takes them back. The only writer of `Sequence.block_table`."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """num_blocks includes the null block."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._is_free = np.ones(num_blocks, dtype=bool)
        self._is_free[NULL_BLOCK] = False
        self._num_free = num_blocks - 1

    @property
    def num_usable_blocks(self) -> int:
        """Blocks that sequences can ever hold."""
        return self.num_blocks - 1

    @property
    def usage(self) -> float:
        """Share of usable blocks in use, 0..1."""
        return 1.0 - self._num_free / self.num_usable_blocks

    def can_allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether `sequence` could hold `num_tokens` in all."""
        return self._num_missing_blocks(sequence, num_tokens) <= self._num_free

    def allocate(self, sequence: Sequence, num_tokens: int, spare_tokens: int = 0) -> None:
        """Grow the block table until it holds `num_tokens` in all. Call `can_allocate` first.

        While memory is plenty it is grown for `spare_tokens` more, so that the sequence stays in one run.
        """
        count = self._num_missing_blocks(sequence, num_tokens)
        roomy = self._num_missing_blocks(sequence, num_tokens + spare_tokens)
        if self._num_free - roomy >= PLENTY * self.num_usable_blocks:
            count = roomy
        if count:
            blocks = self._choose(count, after=sequence.block_table[-1] if sequence.block_table else None)
            self._is_free[blocks] = False
            self._num_free -= count
            sequence.block_table.extend(blocks)

    def free(self, sequence: Sequence) -> None:
        """Take all blocks of `sequence` back."""
        self._is_free[sequence.block_table] = True
        self._num_free += len(sequence.block_table)
        sequence.block_table.clear()

    def check_integrity(self, holders: Iterable[Sequence]) -> None:
        """Every block is free or held by exactly one sequence. Raises AssertionError."""
        held = [block for sequence in holders for block in sequence.block_table]
        free = np.flatnonzero(self._is_free).tolist()
        assert sorted(held + free) == list(range(1, self.num_blocks)), "a block is lost, null, or has two owners"
        assert len(free) == self._num_free, "the count of free blocks is wrong"

    def _choose(self, count: int, after: int | None) -> list[int]:
        """Free blocks: the ones that follow `after`, else the lowest run, else the lowest ones."""
        if (
            after is not None
            and after + count < self.num_blocks
            and self._is_free[after + 1 : after + 1 + count].all()
        ):
            return list(range(after + 1, after + 1 + count))
        free = np.flatnonzero(self._is_free)
        starts = np.flatnonzero(free[count - 1 :] - free[: len(free) - count + 1] == count - 1)
        first = starts[0] if len(starts) else 0
        chosen: list[int] = free[first : first + count].tolist()
        return chosen

    def _num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        return max(0, -(-num_tokens // self.block_size) - len(sequence.block_table))
