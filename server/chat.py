"""POST /v1/chat/completions: the decisions between a valid request and its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace

from starlette.responses import Response

from server.chat_template import AUDIO, Turn
from server.media import ClipRef, Recording, all_clips, check_windows_fit, truncation_header
from server.prompt import Prompt
from server.replies import ChatReply
from server.schema import AudioPart, ChatRequest, LongAudio, Message, TextPart
from server.serving import Serving


async def complete_chat(serving: Serving, request: ChatRequest) -> Response:
    """Hear the clips, build the prompt, answer. Raises ApiError, RequestError, EngineDeadError."""
    model = serving.model_name(request.model)
    prompt, recordings = await read_messages(serving, request.messages, request.long_audio)
    reply = ChatReply(model, serving.prompts.tokenizer, logprobs=request.num_logprobs is not None)
    response = await serving.answer(request, prompt, all_clips(recordings), reply)
    response.headers.update(truncation_header(recordings))
    return response


async def read_messages(
    serving: Serving, messages: list[Message], long_audio: LongAudio | None
) -> tuple[Prompt, list[Recording]]:
    """What the model reads of a conversation, and the recordings in it. Raises ApiError."""
    recordings = await serving.media.load(_clip_refs(messages), long_audio)
    check_windows_fit(recordings, serving.engine.info.max_model_len)
    turns = _spread([_turn(message) for message in messages], [len(item.clips) for item in recordings])
    clip_tokens = [clip.num_tokens for clip in all_clips(recordings)]
    prompt = await asyncio.to_thread(serving.prompts.chat, turns, clip_tokens)
    return replace(prompt, truncated_audio_s=sum(item.truncated_s for item in recordings)), recordings


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
        else replace(
            turn,
            content=tuple(
                copy for part in turn.content for copy in ([AUDIO] * next(counts) if part is AUDIO else [part])
            ),
        )
        for turn in turns
    ]
