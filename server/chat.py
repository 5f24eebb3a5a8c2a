"""POST /v1/chat/completions: the decisions between a valid request and its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace

from starlette.responses import Response

from server.chat_template import AUDIO, Turn
from server.media import ClipRef, all_clips, check_windows_fit, truncation_header
from server.replies import ChatReply
from server.schema import AudioPart, ChatRequest, Message, TextPart
from server.serving import Serving


async def complete_chat(serving: Serving, request: ChatRequest) -> Response:
    """Hear the clips, build the prompt, answer. Raises ApiError, RequestError, EngineDeadError."""
    model = serving.model_name(request.model)
    recordings = await serving.media.load(_clip_refs(request.messages), request.long_audio)
    check_windows_fit(recordings, serving.engine.info.max_model_len)
    clips = all_clips(recordings)
    turns = _spread([_turn(message) for message in request.messages], [len(item.clips) for item in recordings])
    prompt = await asyncio.to_thread(serving.prompts.chat, turns, [clip.num_tokens for clip in clips])
    prompt = replace(prompt, truncated_audio_s=sum(item.truncated_s for item in recordings))
    reply = ChatReply(model, serving.prompts.tokenizer, logprobs=request.num_logprobs is not None)
    response = await serving.answer(request, prompt, clips, reply)
    response.headers.update(truncation_header(recordings))
    return response


def _clip_refs(messages: list[Message]) -> list[ClipRef]:
    return [
        ClipRef(part, f"messages[{turn}].content[{index}]")
        for turn, message in enumerate(messages)
        if not isinstance(message.content, str)
        for index, part in enumerate(message.content)
        if isinstance(part, AudioPart)
    ]


def _turn(message: Message) -> Turn:
    """A message as templates know it: `developer` is OpenAI's newer word for `system`."""
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return Turn(role, message.content)
    return Turn(role, tuple(part.text if isinstance(part, TextPart) else AUDIO for part in message.content))


def _spread(turns: Iterable[Turn], num_clips: Sequence[int]) -> list[Turn]:
    """Give each recording a place for every clip that it was split into: consecutive audios of its turn."""
    counts = iter(num_clips)
    return [
        turn
        if isinstance(turn.content, str)
        else Turn(
            turn.role,
            tuple(copy for part in turn.content for copy in ([AUDIO] * next(counts) if part is AUDIO else [part])),
        )
        for turn in turns
    ]
