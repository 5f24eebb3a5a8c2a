"""POST /v1/chat/completions: the decisions between a valid request and its answer."""

from __future__ import annotations

import asyncio

from starlette.responses import Response

from server.chat_template import AUDIO, Turn
from server.media import ClipRef
from server.replies import ChatReply
from server.schema import AudioPart, ChatRequest, Message, TextPart
from server.serving import Serving


async def complete_chat(serving: Serving, request: ChatRequest) -> Response:
    """Hear the clips, build the prompt, answer. Raises ApiError, RequestError, EngineDeadError."""
    model = serving.model_name(request.model)
    clips = await serving.media.load(_clip_refs(request.messages))
    turns = [_turn(message) for message in request.messages]
    prompt = await asyncio.to_thread(
        serving.prompts.chat,
        turns,
        [clip.num_tokens for clip in clips],
        add_generation_prompt=request.add_generation_prompt is not False,
        continue_final_message=bool(request.continue_final_message),
    )
    reply = ChatReply(
        model,
        serving.prompts.tokenizer,
        logprobs=request.num_logprobs is not None,
        n=request.num_choices,
        echoes=(_echo(turns[-1]) if request.echo else "",),
        prompt_ids=(prompt.token_ids,) if request.return_token_ids else None,
    )
    return await serving.answer(request, prompt, clips, reply)


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


def _echo(turn: Turn) -> str:
    """What an answer continues: the text of a turn of the assistant's."""
    return "".join(part or "" for part in turn.content) if turn.role == "assistant" else ""
