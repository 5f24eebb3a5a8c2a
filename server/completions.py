"""POST /v1/completions: a raw prompt, as base checkpoints need it, with a list of clips beside it.

Control tokens in the prompt count; each `<|AUDIO|>` is the place of one recording, in order, with or without the
markers around it. A recording that was split takes as many places in a row, each with markers where the one had.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from starlette.responses import Response

from server.media import ClipRef, all_clips, check_windows_fit, truncation_header
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
    recordings = await serving.media.load(refs, request.long_audio)
    check_windows_fit(recordings, serving.engine.info.max_model_len)
    clips = all_clips(recordings)
    places = [[clip.num_tokens for clip in item.clips] for item in recordings]
    prompt = await asyncio.to_thread(serving.prompts.raw, request.prompt, places)
    prompt = replace(prompt, truncated_audio_s=sum(item.truncated_s for item in recordings))
    reply = CompletionReply(model, serving.prompts.tokenizer, logprobs=request.num_logprobs is not None)
    response = await serving.answer(request, prompt, clips, reply)
    response.headers.update(truncation_header(recordings))
    return response
