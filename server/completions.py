"""POST /v1/completions: a raw prompt, as base checkpoints need it, with a list of clips beside it.

Control tokens in the prompt count; each `<|AUDIO|>` is the place of one clip, in order, with or without the
markers around it.
"""

from __future__ import annotations

import asyncio

from starlette.responses import Response

from server.media import ClipRef
from server.replies import CompletionReply
from server.sampling import check_token_ids
from server.schema import AudioPart, CompletionRequest
from server.serving import Serving


async def complete_prompt(serving: Serving, request: CompletionRequest) -> Response:
    """Hear the clips, build the prompt, answer. Raises ApiError, RequestError, EngineDeadError."""
    model = serving.model_name(request.model)
    if not isinstance(request.prompt, str):
        check_token_ids(request.prompt, serving.engine.info.vocab_size, "prompt")
    refs = [
        ClipRef(part, f"audio[{index}]")
        for index, part in enumerate(request.audio or [])
        if isinstance(part, AudioPart)
    ]
    clips = await serving.media.load(refs)
    prompt = await asyncio.to_thread(serving.prompts.raw, request.prompt, [clip.num_tokens for clip in clips])
    reply = CompletionReply(model, serving.prompts.tokenizer, logprobs=request.num_logprobs is not None)
    return await serving.answer(request, prompt, clips, reply)
