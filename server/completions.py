"""POST /v1/completions: raw prompts, as base checkpoints need them, with a list of clips beside them.

Control tokens in a prompt count; each `<|AUDIO|>` is the place of one clip, in order through all prompts, with or
without the markers around it.
"""

from __future__ import annotations

import asyncio
from itertools import islice

from starlette.responses import Response

from server.media import ClipRef
from server.replies import CompletionReply
from server.sampling import check_token_ids
from server.schema import AudioPart, CompletionRequest
from server.serving import Serving
from server.tokenizer import Tokenizer


async def complete_prompt(serving: Serving, request: CompletionRequest) -> Response:
    """Hear the clips, build the prompts, answer. Raises ApiError, RequestError, EngineDeadError."""
    model = serving.model_name(request.model)
    for prompt in request.prompts:
        if not isinstance(prompt, str):
            check_token_ids(prompt, serving.engine.info.vocab_size, "prompt")
    refs = [
        ClipRef(part, f"audio[{index}]")
        for index, part in enumerate(request.audio or [])
        if isinstance(part, AudioPart)
    ]
    clips = await serving.media.load(refs)
    prompts = await asyncio.to_thread(serving.prompts.raw_all, request.prompts, [clip.num_tokens for clip in clips])
    tokenizer = serving.prompts.tokenizer
    reply = CompletionReply(
        model,
        tokenizer,
        logprobs=request.num_logprobs is not None,
        n=request.num_choices,
        echoes=[_text(prompt, tokenizer) if request.echo else "" for prompt in request.prompts],
        prompt_ids=[prompt.token_ids for prompt in prompts] if request.return_token_ids else None,
    )
    rest = iter(clips)
    return await serving.answer_all(
        request, [(prompt, list(islice(rest, len(prompt.clip_offsets)))) for prompt in prompts], reply
    )


def _text(prompt: str | list[int], tokenizer: Tokenizer) -> str:
    """A prompt as it is echoed: placeholders once, however long the clip."""
    if isinstance(prompt, str):
        return prompt
    return b"".join(map(tokenizer.bytes_of, prompt)).decode(errors="replace")
