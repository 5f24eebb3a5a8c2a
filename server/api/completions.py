"""POST /v1/completions: raw prompts, as base checkpoints need them, with a list of clips beside them.

Control tokens in a prompt count; each `<|AUDIO|>` is the place of one recording, in order through all prompts, with
or without the markers around it. A recording that was split takes as many places in a row, each with markers where
the one had.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from starlette.responses import Response

from server.generation.replies import CompletionReply
from server.generation.sampling import check_token_ids
from server.generation.serving import Serving
from server.media.loader import (
    ClipRef,
    Recording,
    all_clips,
    check_windows_fit,
    truncated_seconds,
    truncation_header,
)
from server.prompt.builder import Prompt
from server.prompt.tokenizer import Tokenizer
from server.requests.content_parts import AudioInput, AudioPart
from server.requests.schema import CompletionRequest, LongAudio


async def complete_prompt(serving: Serving, request: CompletionRequest) -> Response:
    """Hear the clips, build the prompts, answer. Raises ApiError, RequestError, EngineDeadError."""
    model = serving.model_name(request.model)
    prompts, recordings = await read_prompts(serving, request.prompts, request.audio, request.long_audio)
    tokenizer = serving.prompts.tokenizer
    reply = CompletionReply(
        model,
        tokenizer,
        logprobs=request.num_logprobs is not None,
        n=request.num_choices,
        echoes=[_text(prompt, tokenizer) if request.echo else "" for prompt in request.prompts],
        prompt_ids=[prompt.token_ids for prompt in prompts] if request.return_token_ids else None,
    )
    rest = iter(all_clips(recordings))
    response = await serving.answer_all(
        request, [(prompt, list(islice(rest, len(prompt.clip_offsets)))) for prompt in prompts], reply
    )
    response.headers.update(truncation_header(recordings))
    return response


async def read_prompts(
    serving: Serving,
    prompts: Sequence[str | list[int]],
    audio: Sequence[AudioInput] | None,
    long_audio: LongAudio | None,
) -> tuple[list[Prompt], list[Recording]]:
    """What the model reads of raw prompts, and the recordings beside them. Raises ApiError."""
    for prompt in prompts:
        if not isinstance(prompt, str):
            check_token_ids(prompt, serving.engine.info.vocab_size, "prompt")
    refs = [
        ClipRef(part, f"audio[{index}]") for index, part in enumerate(audio or []) if isinstance(part, AudioPart)
    ]
    recordings = await serving.media.load(refs, long_audio)
    check_windows_fit(recordings, serving.engine.info.max_model_len)
    places = [[clip.num_tokens for clip in recording.clips] for recording in recordings]
    with serving.record.timing("prompt"):
        first, *others = await asyncio.to_thread(serving.prompts.raw_all, prompts, places)
    return [replace(first, truncated_audio_s=truncated_seconds(recordings)), *others], recordings


def _text(prompt: str | list[int], tokenizer: Tokenizer) -> str:
    """A prompt as it is echoed: placeholders once, however long the clip."""
    if isinstance(prompt, str):
        return prompt
    return b"".join(map(tokenizer.bytes_of, prompt)).decode(errors="replace")
