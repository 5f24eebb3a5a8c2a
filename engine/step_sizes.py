"""How many tokens the steps so far had: counts for a histogram. Torch-free; the scheduler's."""

from __future__ import annotations

STEP_SIZE_BOUNDS = tuple(2**power for power in range(15))
"""Tokens: 1 to 16,384."""


class StepSizes:
    """Counts steps by the power of two that their tokens do not exceed."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.counts = [0] * (len(STEP_SIZE_BOUNDS) + 1)
        """For each bound, then those beyond the last."""

    @property
    def num_steps(self) -> int:
        """All of them."""
        return sum(self.counts)

    def add(self, num_tokens: int) -> None:
        """Count a step of at least one token."""
        self.num_tokens += num_tokens
        self.counts[min((num_tokens - 1).bit_length(), len(STEP_SIZE_BOUNDS))] += 1
