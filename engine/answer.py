"""What a step adds to an answer, and when that ends it. Torch-free."""

from __future__ import annotations

import time
from dataclasses import dataclass

from engine.messages import EngineOutput, FinishReason, RequestTimes, SequenceId, TokenLogprobs
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What the runner found for a sequence that samples."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None
    """Set when this sequence alone cannot go on (its logits are not numbers, say)."""
    complete: bool = False
    """Whether the answer ends with it because its grammar does."""


def grow(sequence: Sequence, tokens: tuple[SampledToken, ...], max_model_len: int) -> EngineOutput:
    """Append tokens, at least one, up to that which ends the answer or fails it: what comes behind is dropped."""
    num_before = len(sequence.token_ids)
    for token in tokens:
        if token.error:
            return failed(sequence.sequence_id, token.error)
        sequence.token_ids.append(token.token_id)
        if reason := _finish_reason(sequence, token, max_model_len):
            break
    is_first = num_before == sequence.num_prompt_tokens
    new_token_ids = tuple(sequence.token_ids[num_before:])
    is_stop_token = reason is FinishReason.STOP and token.token_id in sequence.sampling.stop_token_ids
    return EngineOutput(
        request_id=sequence.request_id,
        new_token_ids=new_token_ids,
        logprobs=tuple(one.logprobs for one in tokens[: len(new_token_ids)] if one.logprobs)
        if token.logprobs
        else (),
        finish_reason=reason,
        stop_token_id=token.token_id if is_stop_token else None,
        num_cached_tokens=sequence.num_cached_tokens if is_first else 0,
        index=sequence.index,
        times=_times(sequence) if is_first else None,
    )


def _times(sequence: Sequence) -> RequestTimes:
    """As of its first token."""
    return RequestTimes(sequence.queued_at, sequence.scheduled_at, sequence.encoding, time.monotonic())


def failed(sequence_id: SequenceId, error: str) -> EngineOutput:
    """The last output of a choice that cannot go on, or the only one of a choice that was refused."""
    request_id, index = sequence_id
    return EngineOutput(request_id, finish_reason=FinishReason.ERROR, error=error, index=index)


def is_full(sequence: Sequence, max_model_len: int) -> bool:
    """Whether the answer ends with its newest token, whatever that is."""
    return sequence.num_output_tokens >= sequence.sampling.max_tokens or sequence.num_tokens >= max_model_len


def _finish_reason(sequence: Sequence, token: SampledToken, max_model_len: int) -> FinishReason | None:
    """Whether the answer ends with its newest token, and why."""
    sampling = sequence.sampling
    is_stop_token = token.token_id in sampling.stop_token_ids
    if token.complete or (is_stop_token and sequence.num_output_tokens >= sampling.min_tokens):
        return FinishReason.STOP
    return FinishReason.LENGTH if is_full(sequence, max_model_len) else None
