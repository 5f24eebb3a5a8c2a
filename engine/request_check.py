"""What could never run, or would break a step for everybody, found before it is queued. Torch-free.

The HTTP side has checked all this; the engine does not trust it with everybody's requests.
"""

from __future__ import annotations

from engine.errors import RequestError
from engine.messages import EngineInfo, EngineRequest, SamplingParams
from model.config import MAX_AUDIO_SAMPLES, num_audio_tokens

MAX_CHOICES = 128
"""Of one request, as OpenAI has it."""


def check_request(request: EngineRequest, info: EngineInfo) -> None:
    """Raise RequestError when an engine of this kind cannot run it."""
    length = len(request.prompt_token_ids)
    position = 0
    for clip in request.clips:
        num_samples = len(clip.samples)
        if clip.offset < position or clip.offset + clip.num_tokens > length:
            raise RequestError("audio placeholders lie outside the prompt or overlap")
        if not 0 < num_samples <= MAX_AUDIO_SAMPLES or clip.num_tokens != num_audio_tokens(num_samples):
            raise RequestError("an audio clip's length does not match its placeholders")
        position = clip.offset + clip.num_tokens
    if not 0 < length < info.max_model_len:
        raise RequestError(f"a prompt has 1 to {info.max_model_len - 1} tokens; this one has {length}")
    if not all(0 <= token < info.vocab_size for token in request.prompt_token_ids):
        raise RequestError("the prompt holds a token id outside the vocabulary")
    if not 1 <= request.n <= MAX_CHOICES:
        raise RequestError(f"n must be 1 to {MAX_CHOICES}")
    _check_sampling(request.sampling, info.vocab_size)


def _check_sampling(params: SamplingParams, vocab_size: int) -> None:
    ids = (*params.stop_token_ids, *(token for token, _ in params.logit_bias))
    if not all(0 <= token < vocab_size for token in ids):
        raise RequestError("stop_token_ids or logit_bias hold a token id outside the vocabulary")
    if params.seed is not None and not -(1 << 63) <= params.seed < 1 << 63:
        raise RequestError("seed must be a 64-bit integer")
    if params.logprobs is not None and not 0 <= params.logprobs <= vocab_size:
        raise RequestError(f"logprobs must be 0 to {vocab_size}")
    if params.max_tokens < 1:
        raise RequestError("max_tokens must be at least 1")
