"""POST /v1/chat/completions: the decisions between a valid request and its answer."""

from __future__ import annotations

import asyncio

from starlette.responses import Response

from server.chat_template import AUDIO, Turn
from server.media import Clip, ClipRef
from server.prompt import Prompt
from server.replies import ChatReply
from server.schema import AudioPart, ChatRequest, Message, TextPart
from server.serving import Serving


async def complete_chat(serving: Serving, request: ChatRequest) -> Response:
    """Hear the clips, build the prompt, answer. Raises ApiError, RequestError, EngineDeadError."""
    model = serving.model_name(request.model)
    prompt, clips = await read_messages(serving, request.messages)
    reply = ChatReply(model, serving.prompts.tokenizer, logprobs=request.num_logprobs is not None)
    return await serving.answer(request, prompt, clips, reply)


async def read_messages(serving: Serving, messages: list[Message]) -> tuple[Prompt, list[Clip]]:
    """What the model reads of a conversation, and the clips in it. Raises ApiError."""
    clips = await serving.media.load(_clip_refs(messages))
    turns = [_turn(message) for message in messages]
    return await asyncio.to_thread(serving.prompts.chat, turns, [clip.num_tokens for clip in clips]), clips


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
