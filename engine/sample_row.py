"""One row of a step's logits: the token of a sequence that comes after its own and after some drafts. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from engine.messages import SamplingParams, SequenceId
from engine.scheduler import SchedulerOutput
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What the sampler knows of a row. The rows of a sequence follow each other: no draft, one draft, and so on."""

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


def sample_rows(plan: SchedulerOutput) -> list[SampleRow]:
    """The rows of a plan, in the order of `InputBatch.sample_rows`."""
    return [
        SampleRow(item.sequence, item.draft_token_ids[:num_drafts])
        for item in plan.scheduled
        if item.samples
        for num_drafts in range(1 + len(item.draft_token_ids))
    ]
