"""Who owns which block of the paged KV cache (Kwon et al. 2023). Torch-free bookkeeping: no tensor is touched.

A block holds the keys and values of `block_size` consecutive tokens. Sequences that begin alike may hold the same
blocks: each block counts its holders, and is free when it has none. Only full blocks are shared, and none is ever
written while it has two holders. Block 0 is never given out: padding points at it.

Any block serves, but consecutive ones serve better: a CPU then attends over the cache in place instead of gathering
(see model/attention/reference.py). So a sequence gets a run of blocks where there is one, some spare blocks to grow
into while memory is plenty, and the lowest run first, so that memory once touched is reused.
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
        self._num_holders = np.zeros(num_blocks, dtype=np.int32)
        self._num_holders[NULL_BLOCK] = 1
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
            self._num_holders[blocks] = 1
            self._num_free -= count
            sequence.block_table.extend(blocks)

    def share(self, donor: Sequence, sequence: Sequence, num_blocks: int) -> None:
        """Let `sequence`, which holds none, hold the first blocks of `donor` too. They must be full."""
        assert not sequence.block_table, "shared blocks come first"
        assert num_blocks * self.block_size <= donor.num_computed_tokens, "only full blocks are shared"
        blocks = donor.block_table[:num_blocks]
        self._num_holders[blocks] += 1
        sequence.block_table.extend(blocks)

    def free(self, sequence: Sequence) -> None:
        """Let go of all blocks of `sequence`; those that nobody else holds are free again."""
        self._num_holders[sequence.block_table] -= 1
        self._num_free += int(np.count_nonzero(self._num_holders[sequence.block_table] == 0))
        sequence.block_table.clear()

    def check_integrity(self, holders: Iterable[Sequence]) -> None:
        """Every block is free or held by those who say so, and what will be written by one only.

        Raises AssertionError.
        """
        holders = list(holders)
        counted = np.zeros_like(self._num_holders)
        counted[NULL_BLOCK] = 1
        for sequence in holders:
            assert NULL_BLOCK not in sequence.block_table, "the null block has been given out"
            assert len(set(sequence.block_table)) == len(sequence.block_table), "a sequence holds a block twice"
            counted[sequence.block_table] += 1
        assert (counted == self._num_holders).all(), "a block is lost, or its holders are miscounted"
        assert np.count_nonzero(counted == 0) == self._num_free, "the count of free blocks is wrong"
        for sequence in holders:
            to_write = sequence.block_table[sequence.num_computed_tokens // self.block_size :]
            assert (self._num_holders[to_write] == 1).all(), "a block that will be written is shared"

    def _choose(self, count: int, after: int | None) -> list[int]:
        """Free blocks: the ones that follow `after`, else the lowest run, else the lowest ones."""
        if (
            after is not None
            and after + count < self.num_blocks
            and not self._num_holders[after + 1 : after + 1 + count].any()
        ):
            return list(range(after + 1, after + 1 + count))
        free = np.flatnonzero(self._num_holders == 0)
        starts = np.flatnonzero(free[count - 1 :] - free[: len(free) - count + 1] == count - 1)
        first = starts[0] if len(starts) else 0
        chosen: list[int] = free[first : first + count].tolist()
        return chosen

    def _num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        return max(0, -(-num_tokens // self.block_size) - len(sequence.block_table))
