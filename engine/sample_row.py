"""One row of a step's logits: the token of a sequence that comes after its own and after some drafts. Torch-free."""

from __future__ import annotations

from typing import NamedTuple

from engine.messages import SamplingParams, SequenceId
from engine.plan import SchedulerOutput
from engine.sequence import Sequence, SequenceStatus


class SampleRow(NamedTuple):
    """What the sampler knows of a row. The rows of a sequence follow each other: no draft, one draft, and so on.

    A tuple, as a step makes one for each row and compares them with those of the step before.
    """

    sequence: Sequence
    draft_token_ids: tuple[int, ...] = ()
    """Taken for granted in this row."""

    @property
    def sequence_id(self) -> SequenceId:
        """Whose token it is."""
        return self.sequence.sequence_id

    @property
    def sampling(self) -> SamplingParams:
        """How to choose it."""
        return self.sequence.sampling

    @property
    def seed(self) -> int:
        """The sequence's."""
        return self.sequence.seed

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the answer before it."""
        return self.sequence.num_output_tokens + len(self.draft_token_ids)


def sample_rows(plan: SchedulerOutput, last_rows: tuple[int, ...]) -> dict[int, SampleRow]:
    """For each packed row of a plan that is to be sampled, in order: what to know of it. Ended sequences have none.

    last_rows: of each sequence of the plan, the last of its packed rows.
    """
    rows = {}
    for last_row, item in zip(last_rows, plan.scheduled, strict=True):
        if item.samples and item.sequence.status is not SequenceStatus.FINISHED:
            drafts = item.draft_token_ids
            for num_drafts in range(1 + len(drafts)):
                rows[last_row - len(drafts) + num_drafts] = SampleRow(item.sequence, drafts[:num_drafts])
    return rows
