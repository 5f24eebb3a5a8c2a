"""Who owns which block of the paged KV cache (Kwon et al. 2023). Torch-free bookkeeping: no tensor is touched.

A block holds the keys and values of `block_size` consecutive tokens of one sequence. Block 0 is never given out:
padding points at it. Free blocks are reused last-in first-out, so that memory once touched stays warm.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.sequence import Sequence

NULL_BLOCK = 0


class BlockManager:
    """Gives blocks to sequences and takes them back. The only writer of `Sequence.block_table`."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """num_blocks includes the null block."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))

    @property
    def num_usable_blocks(self) -> int:
        """Blocks that sequences can ever hold."""
        return self.num_blocks - 1

    @property
    def usage(self) -> float:
        """Share of usable blocks in use, 0..1."""
        return 1.0 - len(self._free) / self.num_usable_blocks

    def can_allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether `sequence` could hold `num_tokens` in all."""
        return self._num_missing_blocks(sequence, num_tokens) <= len(self._free)

    def allocate(self, sequence: Sequence, num_tokens: int) -> None:
        """Grow the block table until it holds `num_tokens` in all. Call `can_allocate` first."""
        for _ in range(self._num_missing_blocks(sequence, num_tokens)):
            sequence.block_table.append(self._free.pop())

    def free(self, sequence: Sequence) -> None:
        """Take all blocks of `sequence` back."""
        self._free.extend(reversed(sequence.block_table))
        sequence.block_table.clear()

    def check_integrity(self, holders: Iterable[Sequence]) -> None:
        """Every block is free or held by exactly one sequence. Raises AssertionError."""
        held = [block for sequence in holders for block in sequence.block_table]
        everywhere = sorted(held + self._free)
        assert everywhere == list(range(1, self.num_blocks)), "a block is lost, null, or has two owners"

    def _num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        return max(0, -(-num_tokens // self.block_size) - len(sequence.block_table))
