"""How many drafts each sequence of a step gets, and how many came true. Torch-free.

Drafts take what is left: tokens of the step's budget after everybody else, places that the sequence's blocks have
anyway, or spare blocks while memory is plenty. So they neither preempt anybody nor keep anybody waiting. They are
never so many that the answer could outgrow its limits. A sequence with a grammar gets none: its masks are made one
token at a time.
"""

from __future__ import annotations

from engine.block_manager import BlockManager
from engine.messages import EngineOutput
from engine.prompt_lookup import PromptLookup
from engine.sequence import Sequence


class Speculation:
    """`draft` when a step is planned, `count_rejected` when it has been computed."""

    def __init__(self, lookup: PromptLookup, num_tokens: int, max_model_len: int) -> None:
        """num_tokens: drafts for a sequence in a step, at most."""
        self._lookup = lookup
        self.num_tokens = num_tokens
        self._max_model_len = max_model_len
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0

    def draft(self, sequence: Sequence, blocks: BlockManager, tokens_left: int) -> tuple[int, ...]:
        """Tokens to verify behind the last one of `sequence`; its blocks have room for them."""
        sampling = sequence.sampling
        room = min(
            self.num_tokens,
            tokens_left,
            sampling.max_tokens - sequence.num_output_tokens - 1,  # one more is sampled behind the drafts
            self._max_model_len - sequence.num_tokens - 1,
        )
        if room < 1 or sampling.grammar is not None:
            return ()
        drafts = self._lookup.propose(sequence, room)
        if drafts:
            blocks.allocate(sequence, sequence.num_tokens, spare_tokens=len(drafts))
        return drafts[: len(sequence.block_table) * blocks.block_size - sequence.num_tokens]

    def release(self, sequence: Sequence) -> None:
        """Forget an ended sequence."""
        self._lookup.release(sequence.sequence_id)

    def count_rejected(self, num_drafts: int, output: EngineOutput | None) -> int:
        """-> drafts of one sequence in one step that did not come true: all new tokens but the last one did."""
        if not num_drafts:
            return 0
        num_accepted = min(num_drafts, max(0, len(output.new_token_ids) - 1)) if output else 0
        self.num_draft_tokens += num_drafts
        self.num_accepted_tokens += num_accepted
        return num_drafts - num_accepted


NO_SPECULATION = Speculation(PromptLookup(1, 1), num_tokens=0, max_model_len=0)
