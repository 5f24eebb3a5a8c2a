"""From a request's parameters to the engine's: defaults, the checkpoint's ranges, the length that is left.

What a request leaves out is what the checkpoint's generation_config.json says, as users of vLLM and transformers
expect, or OpenAI's neutral default. Ranges that need no checkpoint were checked by server/requests/schema.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from engine.messages import SamplingParams
from model.config import GenerationConfig
from server.errors import bad_request
from server.requests.schema import GenerationRequest

T = TypeVar("T")

GREEDY_BELOW = 1e-5
"""A temperature that 32-bit floats cannot divide by means: the best token."""
SMALLEST_TOP_P = 1e-6
"""OpenAI allows 0: the best token alone."""


def sampling_params(
    request: GenerationRequest,
    defaults: GenerationConfig,
    *,
    room: int,
    vocab_size: int,
    grammar: str | None = None,
) -> SamplingParams:
    """How to sample the answer to a request, whose prompt leaves `room` tokens of the context.

    `defaults` brings the end-of-sequence ids too. Raises ApiError for token ids out of the vocabulary and for
    more `min_tokens` than there is room for.
    """
    temperature = _given(request.temperature, defaults.temperature)
    stop_ids = request.stop_token_ids or []
    check_token_ids(stop_ids, vocab_size, "stop_token_ids")
    eos_ids = () if request.ignore_eos else defaults.eos_token_ids
    max_tokens = min(_given(request.token_limit, room), room)
    if request.min_tokens is not None and request.min_tokens > max_tokens:
        message = f"Invalid 'min_tokens': the prompt leaves room for {room} tokens."
        raise bad_request(message, "min_tokens", "invalid_value")
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=request.min_tokens or 0,
        temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
        top_k=max(_given(request.top_k, defaults.top_k), 0),
        top_p=max(_given(request.top_p, defaults.top_p), SMALLEST_TOP_P),
        min_p=request.min_p or 0.0,
        repetition_penalty=_given(request.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=_logit_bias(request.logit_bias or {}, vocab_size),
        seed=request.seed,
        stop_token_ids=tuple(dict.fromkeys((*eos_ids, *stop_ids))),
        logprobs=request.num_logprobs,
        grammar=grammar,
    )


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


def _logit_bias(biases: Mapping[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    for key in biases:
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise bad_request("Invalid 'logit_bias': every key must be a token id.", "logit_bias", "invalid_value")
    by_id = {int(key): bias for key, bias in biases.items()}
    check_token_ids(list(by_id), vocab_size, "logit_bias")
    return tuple(by_id.items())


def check_token_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raise ApiError unless all ids are in the vocabulary (they are known not to be negative)."""
    outside = [token_id for token_id in ids if token_id >= vocab_size]
    if outside:
        message = f"Invalid '{param}': token id {outside[0]} is outside the vocabulary of {vocab_size}."
        raise bad_request(message, param, "invalid_value")
