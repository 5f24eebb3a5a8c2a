"""One choice of a request inside the engine: the scheduler's mutable state. Torch-free.

Only the scheduler with its queue changes a sequence, and only the block manager with its prefix cache what is about
blocks; everybody else reads. There is no phase: a sequence has tokens, and `num_computed_tokens` of them are in the
cache. A step computes some of the rest; when none is left but the newest, that is what others call decoding. The
choices of a request are sequences of their own with the same prompt; where they share blocks of the cache is the
scheduler's business.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum, auto

from engine.messages import AudioClip, EngineRequest, SamplingParams, SequenceId


class SequenceStatus(Enum):
    """Where the queue keeps it."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """See the module's docstring. Compared by identity."""

    request: EngineRequest
    seed: int
    """This choice's (see `choice_seed`): part of the sequence, so a recompute samples the same."""
    index: int = 0
    """Which of the request's choices."""
    arrival: int = 0
    """Number of its request in order of arrival, given by the queue."""
    token_ids: list[int] = field(init=False)
    """Prompt, then output."""
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    """1 while a step in flight samples a token of it: the token is counted, and not in `token_ids` yet."""
    block_table: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    """Of its first blocks, as far as somebody asked: what they are found by (see prefix_cache)."""
    num_published_blocks: int = 0
    """First blocks that others may find."""
    num_cached_tokens: int = 0
    """Tokens of the prompt that the prefix cache had when its request was first admitted."""
    status: SequenceStatus = SequenceStatus.WAITING
    queued_at: float = field(default_factory=time.monotonic)
    scheduled_at: float = 0.0
    encoding: tuple[float, float] | None = None
    """These three: see `engine.messages.RequestTimes`. Nothing is decided by them."""
    sequence_id: SequenceId = field(init=False)
    """Unique among all sequences in the engine: the key of whatever is kept for each of them."""
    sampling: SamplingParams = field(init=False)
    """How to choose its tokens."""
    end_of_clips: int = field(init=False)
    """The position after the last placeholder; 0 without clips."""

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        self.sampling = self.request.sampling
        self.sequence_id = self.request.request_id, self.index
        self.end_of_clips = max((clip.offset + clip.num_tokens for clip in self.request.clips), default=0)

    @property
    def request_id(self) -> str:
        """The caller's name for its request."""
        return self.request.request_id

    @property
    def rank(self) -> tuple[int, int, int]:
        """Place in line, the least first: by priority, then arrival, then choice."""
        return self.request.priority, self.arrival, self.index

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_prompt_tokens(self) -> int:
        """Placeholders of audio included."""
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens sampled so far."""
        return len(self.token_ids) + self.num_pending_tokens - len(self.request.prompt_token_ids)

    @property
    def num_missing_tokens(self) -> int:
        """Tokens not yet in the cache; at least 1 between steps."""
        return len(self.token_ids) + self.num_pending_tokens - self.num_computed_tokens

    def clips_within(self, start: int, stop: int) -> list[AudioClip]:
        """Clips with a placeholder in positions [start, stop), in order."""
        if start >= self.end_of_clips:
            return []
        return [clip for clip in self.request.clips if clip.offset < stop and start < clip.offset + clip.num_tokens]


_MASK = (1 << 64) - 1


def choice_seed(seed: int, index: int) -> int:
    """The seed of a request's choice: its own for choice 0, else a hash of both (SplitMix64). -> int64."""
    if index == 0:
        return seed
    bits = (seed + index * 0x9E3779B97F4A7C15) & _MASK
    bits = ((bits ^ bits >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    bits = ((bits ^ bits >> 27) * 0x94D049BB133111EB) & _MASK
    bits ^= bits >> 31
    return bits - (1 << 64) if bits >= 1 << 63 else bits
