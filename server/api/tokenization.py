"""POST /tokenize and /detokenize, vLLM's: what a prompt or a conversation costs, before anything runs on the engine.

The same path as the requests themselves: clips are loaded, the template is rendered, limits hold. What is counted
here is what /v1/chat/completions and /v1/completions will read.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Self

from pydantic import Field, model_validator
from starlette.responses import JSONResponse, Response

from server.api.completions import read_prompts
from server.api.conversation import read_messages
from server.generation.sampling import check_token_ids
from server.generation.serving import Serving
from server.media.loader import all_clips, truncation_header
from server.requests.content_parts import AudioInput
from server.requests.parameters import REFUSED_IN_TOKENIZE, REFUSED_OF_RAW_PROMPTS, check_refused, refused
from server.requests.schema import AnyMessage, LongAudio, Rendering, TokenId
from server.requests.strict_model import MAX_ITEMS, StrictModel

MAX_TOKENS = 1 << 18
"""Of a list to detokenize: far above any context."""


class TokenizeRequest(Rendering):
    """POST /tokenize: a raw prompt with its clips, as for completions, or a conversation with its tools."""

    model: str | None = None
    prompt: Annotated[str, Field(min_length=1)] | None = None
    audio: Annotated[list[AudioInput], Field(max_length=MAX_ITEMS)] | None = None
    messages: Annotated[list[AnyMessage], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)] | None = None
    long_audio: LongAudio | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        check_refused(self.model_extra, REFUSED_IN_TOKENIZE)
        if self.prompt is None and self.messages is None:
            message = "Missing required parameter: 'prompt', or 'messages'."
            raise refused("prompt", message, "missing_required_parameter")
        if self.messages is not None and (self.prompt is not None or self.audio is not None):
            name = "prompt" if self.prompt is not None else "audio"
            raise refused(name, f"'{name}' and 'messages' cannot be tokenized at once.", "invalid_value")
        if self.messages is None:
            check_refused({name: getattr(self, name) for name in REFUSED_OF_RAW_PROMPTS}, REFUSED_OF_RAW_PROMPTS)
        else:
            self.check_messages(self.messages)
        return self


class DetokenizeRequest(StrictModel):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS)]


async def tokenize(serving: Serving, request: TokenizeRequest) -> Response:
    """Count and list the tokens of what a request would read. Raises ApiError."""
    serving.model_name(request.model)
    if request.messages is not None:
        prompt, recordings = await read_messages(serving, request.messages, request.long_audio, request)
    else:
        prompts, recordings = await read_prompts(serving, [request.prompt or ""], request.audio, request.long_audio)
        prompt = prompts[0]
    token_strs = None
    if request.return_token_strs:
        token_strs = await asyncio.to_thread(lambda: [_text_of(serving, [token]) for token in prompt.token_ids])
    return JSONResponse(
        {
            "count": len(prompt.token_ids),
            "max_model_len": serving.engine.info.max_model_len,
            "tokens": prompt.token_ids,
            "token_strs": token_strs,
            "audio_tokens": prompt.num_audio_tokens,
            "audio_tokens_per_clip": [clip.num_tokens for clip in all_clips(recordings)],
        },
        headers=truncation_header(recordings),
    )


async def detokenize(serving: Serving, request: DetokenizeRequest) -> Response:
    """The text of a list of tokens, control tokens included. Raises ApiError."""
    serving.model_name(request.model)
    check_token_ids(request.tokens, serving.engine.info.vocab_size, "tokens")
    return JSONResponse({"prompt": await asyncio.to_thread(_text_of, serving, request.tokens)})


def _text_of(serving: Serving, token_ids: list[int]) -> str:
    """Bytes that are no UTF-8 become U+FFFD."""
    return b"".join(map(serving.prompts.tokenizer.bytes_of, token_ids)).decode(errors="replace")
