"""A request inside the engine: the scheduler's mutable state. Torch-free.

Only the scheduler changes a sequence, and only the block manager its `block_table`; everybody else reads. There is
no phase: a sequence has tokens, and `num_computed_tokens` of them are in the cache. A step computes some of the
rest; when none is left but the newest, that is what others call decoding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from engine.messages import AudioClip, EngineRequest, SamplingParams


class SequenceStatus(Enum):
    """Where the scheduler keeps it."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """See the module's docstring. Compared by identity."""

    request: EngineRequest
    seed: int
    """The request's own, or one given at admission: part of the sequence, so a recompute samples the same."""
    token_ids: list[int] = field(init=False)
    """Prompt, then output."""
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    status: SequenceStatus = SequenceStatus.WAITING

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)

    @property
    def request_id(self) -> str:
        """The caller's name for it."""
        return self.request.request_id

    @property
    def sampling(self) -> SamplingParams:
        """How to choose its tokens."""
        return self.request.sampling

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        """Placeholders of audio included."""
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens sampled so far."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def num_missing_tokens(self) -> int:
        """Tokens not yet in the cache; at least 1 between steps."""
        return len(self.token_ids) - self.num_computed_tokens

    def clips_within(self, start: int, stop: int) -> list[AudioClip]:
        """Clips with a placeholder in positions [start, stop), in order."""
        return [clip for clip in self.request.clips if clip.offset < stop and start < clip.offset + clip.num_tokens]
