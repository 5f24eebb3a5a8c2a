"""POST /v1/completions: a raw prompt, as base checkpoints need it, with a list of clips beside it.

Control tokens in the prompt count; each `<|AUDIO|>` is the place of one clip, in order, with or without the
markers around it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.responses import Response

from server.media import Clip, ClipRef
from server.prompt import Prompt
from server.replies import CompletionReply
from server.sampling import check_token_ids
from server.schema import AudioInput, AudioPart, CompletionRequest
from server.serving import Serving


async def complete_prompt(serving: Serving, request: CompletionRequest) -> Response:
    """Hear the clips, build the prompt, answer. Raises ApiError, RequestError, EngineDeadError."""
    model = serving.model_name(request.model)
    prompt, clips = await read_prompt(serving, request.prompt, request.audio)
    reply = CompletionReply(model, serving.prompts.tokenizer, logprobs=request.num_logprobs is not None)
    return await serving.answer(request, prompt, clips, reply)


async def read_prompt(
    serving: Serving, prompt: str | list[int], audio: Sequence[AudioInput] | None
) -> tuple[Prompt, list[Clip]]:
    """What the model reads of a raw prompt, and the clips beside it. Raises ApiError."""
    if not isinstance(prompt, str):
        check_token_ids(prompt, serving.engine.info.vocab_size, "prompt")
    refs = [
        ClipRef(part, f"audio[{index}]") for index, part in enumerate(audio or []) if isinstance(part, AudioPart)
    ]
    clips = await serving.media.load(refs)
    return await asyncio.to_thread(serving.prompts.raw, prompt, [clip.num_tokens for clip in clips]), clips
