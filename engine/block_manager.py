"""Who owns which block of the paged KV cache (Kwon et al. 2023). Torch-free bookkeeping: no tensor is touched.

A block holds the keys and values of `block_size` consecutive tokens. Sequences that begin alike may hold the same
blocks: each block counts its holders, and is free when it has none. Only full blocks are shared, and none is ever
written while it has two holders. Block 0 is never given out: padding points at it.

With a prefix cache, a block whose contents may be asked for again stays in it when its last holder goes. It is free
all the same: it is given out when no empty one is left, the longest unused first, and of one sequence the tail
before the head. Where untouched memory costs nothing (a CPU), fewer are kept than there are.

Any block serves, but consecutive ones serve better: a CPU then attends over the cache in place instead of gathering
(see model/attention/reference.py). So a sequence gets a run of blocks where there is one, some spare blocks to grow
into while memory is plenty, and the lowest run first, so that memory once touched is reused. Cached blocks may go
before their turn to make a run, but only old ones: more blocks than half of the free have been left there since.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from engine.prefix_cache import PrefixCache
from engine.sequence import Sequence

NULL_BLOCK = 0
PLENTY = 0.5
"""Share of the blocks that must stay free for spare ones to be given."""


class BlockManager:
    """Gives blocks to sequences and takes them back. With its prefix cache the only writer of their block fields."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        prefix_cache: PrefixCache | None = None,
        max_kept_blocks: int | None = None,
    ) -> None:
        """num_blocks includes the null block. Without a prefix cache nothing is found again.

        max_kept_blocks: how many cached blocks that nobody holds are kept at most; None: all of them.
        """
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_cache = prefix_cache
        self.max_kept_blocks = num_blocks if max_kept_blocks is None else max_kept_blocks
        self._num_holders = np.zeros(num_blocks, dtype=np.int32)
        self._num_holders[NULL_BLOCK] = 1
        self._num_free = num_blocks - 1
        self._empty_rank = np.arange(-num_blocks, 0)
        self._last_used = self._empty_rank.copy()
        """Of each free block: the least goes first. Negative: empty; else when it was left in the cache."""
        self._num_left = 0
        """Blocks left in the cache so far: the clock of `_last_used`."""

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
            self._evict(blocks)
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
        sequence.block_keys[:] = donor.block_keys[:num_blocks]
        sequence.num_published_blocks = min(donor.num_published_blocks, num_blocks)

    def reuse(self, sequence: Sequence) -> int:
        """Let `sequence`, which holds none, hold the cached blocks that it begins with. -> the tokens in them.

        Its last token is never among them: whoever samples needs that one's logits.
        """
        assert not sequence.block_table, "shared blocks come first"
        if self._prefix_cache is None:
            return 0
        blocks = self._prefix_cache.find(sequence, (sequence.num_tokens - 1) // self.block_size)
        self._num_free -= int(np.count_nonzero(self._num_holders[blocks] == 0))
        self._num_holders[blocks] += 1
        sequence.block_table.extend(blocks)
        sequence.num_published_blocks = len(blocks)
        return len(blocks) * self.block_size

    def publish(self, sequence: Sequence, num_tokens: int) -> None:
        """Let others find the blocks that the first `num_tokens` fill. These are computed, and without error."""
        if self._prefix_cache is not None:
            self._prefix_cache.publish(sequence, num_tokens // self.block_size)

    def free(self, sequence: Sequence) -> None:
        """Let go of all blocks of `sequence`; those that nobody else holds are free again, cached ones as well."""
        table = np.array(sequence.block_table, dtype=np.int64)
        self._num_holders[table] -= 1
        freed = table[self._num_holders[table] == 0]
        self._num_free += len(freed)
        if self._prefix_cache is not None:
            left = [block for block in reversed(freed.tolist()) if block in self._prefix_cache]
            self._last_used[left] = np.arange(self._num_left, self._num_left + len(left))
            self._num_left += len(left)
            self._drop_excess()
        sequence.block_table.clear()
        sequence.num_published_blocks = 0

    def check_integrity(self, holders: Iterable[Sequence]) -> None:
        """Every block is free or held by those who say so, and what will be written by one only.

        The engine calls it whenever it falls idle, and who asks then waits for it: no loop over all blocks.

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
            if self._prefix_cache is not None:
                assert not any(block in self._prefix_cache for block in to_write), "a cached block will be written"
        if self._prefix_cache is not None:
            self._prefix_cache.check_integrity()
            assert np.count_nonzero((counted == 0) & (self._last_used >= 0)) <= self.max_kept_blocks
        is_cached = np.zeros(len(counted), bool)
        if self._prefix_cache is not None:
            is_cached[list(self._prefix_cache)] = True
        is_wrong = ((self._last_used >= 0) != is_cached) & (counted == 0)
        assert not is_wrong.any(), "a block is taken for empty or cached and is not"

    def _choose(self, count: int, after: int | None) -> list[int]:
        """Free blocks: the ones that follow `after`, else the lowest run, else the ones whose turn it is."""
        old = max(0, self._num_left - self._num_free // 2)
        if after is not None and after + count < self.num_blocks:
            following = slice(after + 1, after + 1 + count)
            if not self._num_holders[following].any() and (self._last_used[following] < old).all():
                return list(range(after + 1, after + 1 + count))
        if count == 1:
            return [int(np.where(self._num_holders == 0, self._last_used, self._num_left).argmin())]
        free = np.flatnonzero(self._num_holders == 0)
        last_used = self._last_used[free]
        run = _lowest_run(free[last_used < 0], count)
        if run is None and after is None and count > 1:
            run = _lowest_run(free[last_used < old], count)
        if run is None:
            run = free[np.argpartition(last_used, count - 1)[:count]]
            run.sort()
        chosen: list[int] = run.tolist()
        return chosen

    def _drop_excess(self) -> None:
        """Of the cached blocks that nobody holds, keep the youngest."""
        kept = np.flatnonzero((self._num_holders == 0) & (self._last_used >= 0))
        if (excess := len(kept) - self.max_kept_blocks) > 0:
            oldest = np.argpartition(self._last_used[kept], excess - 1)[:excess]
            self._evict(kept[oldest].tolist())

    def _evict(self, blocks: list[int]) -> None:
        """They will hold something else."""
        if self._prefix_cache is not None:
            for block in blocks:
                self._prefix_cache.forget(block)
            self._last_used[blocks] = self._empty_rank[blocks]

    def _num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        return max(0, -(-num_tokens // self.block_size) - len(sequence.block_table))


def _lowest_run(blocks: NDArray[np.int64], count: int) -> NDArray[np.int64] | None:
    """The first `count` of `blocks`, which are in order, that follow each other."""
    if len(blocks) < count:
        return None
    starts = np.flatnonzero(blocks[count - 1 :] - blocks[: len(blocks) - count + 1] == count - 1)
    return blocks[starts[0] : starts[0] + count] if len(starts) else None
