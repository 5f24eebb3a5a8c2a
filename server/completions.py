"""POST /v1/completions: a raw prompt, as base checkpoints need it, with a list of clips beside it.

Control tokens in the prompt count; each `<|AUDIO|>` is the place of one recording, in order, with or without the
markers around it. A recording that was split takes as many places in a row, each with markers where the one had.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from starlette.responses import Response

from server.media import ClipRef, Recording, all_clips, check_windows_fit, truncation_header
from server.prompt import Prompt
from server.replies import CompletionReply
from server.sampling import check_token_ids
from server.schema import AudioInput, AudioPart, CompletionRequest, LongAudio
from server.serving import Serving


async def complete_prompt(serving: Serving, request: CompletionRequest) -> Response:
    """Hear the clips, build the prompt, answer. Raises ApiError, RequestError, EngineDeadError."""
    model = serving.model_name(request.model)
    prompt, recordings = await read_prompt(serving, request.prompt, request.audio, request.long_audio)
    reply = CompletionReply(model, serving.prompts.tokenizer, logprobs=request.num_logprobs is not None)
    response = await serving.answer(request, prompt, all_clips(recordings), reply)
    response.headers.update(truncation_header(recordings))
    return response


async def read_prompt(
    serving: Serving, prompt: str | list[int], audio: Sequence[AudioInput] | None, long_audio: LongAudio | None
) -> tuple[Prompt, list[Recording]]:
    """What the model reads of a raw prompt, and the recordings beside it. Raises ApiError."""
    if not isinstance(prompt, str):
        check_token_ids(prompt, serving.engine.info.vocab_size, "prompt")
    refs = [
        ClipRef(part, f"audio[{index}]") for index, part in enumerate(audio or []) if isinstance(part, AudioPart)
    ]
    recordings = await serving.media.load(refs, long_audio)
    check_windows_fit(recordings, serving.engine.info.max_model_len)
    places = [[clip.num_tokens for clip in item.clips] for item in recordings]
    expanded = await asyncio.to_thread(serving.prompts.raw, prompt, places)
    return replace(expanded, truncated_audio_s=sum(item.truncated_s for item in recordings)), recordings
