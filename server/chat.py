"""POST /v1/chat/completions: the decisions between a valid request and its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from starlette.responses import Response

from server.chat_template import AUDIO, PromptEnd, Turn
from server.media import Clip, ClipRef
from server.prompt import Prompt
from server.replies import ChatReply
from server.schema import AnyMessage, AudioPart, ChatRequest, Message
from server.serving import Serving
from server.text_content import TextPart, texts_of
from server.tool_messages import CallingMessage, ToolMessage
from server.tool_plan import Function


async def complete_chat(serving: Serving, request: ChatRequest) -> Response:
    """Hear the clips, build the prompt, answer. Raises ApiError, RequestError, EngineDeadError."""
    model = serving.model_name(request.model)
    clips, prompt = await read_chat(serving, request)
    reply = ChatReply(
        model,
        serving.prompts.tokenizer,
        logprobs=request.num_logprobs is not None,
        n=request.num_choices,
        echoes=(_echo(_turn(request.messages[-1])) if request.echo else "",),
        prompt_ids=(prompt.token_ids,) if request.return_token_ids else None,
    )
    return await serving.answer(request, prompt, clips, reply, request.tool_plan)


async def read_chat(serving: Serving, request: ChatRequest) -> tuple[list[Clip], Prompt]:
    """The clips and the prompt of a request. Raises ApiError."""
    return await read_conversation(
        serving,
        _clip_refs(request.messages),
        lambda: [_turn(message) for message in request.messages],
        request.tool_plan.functions,
        end=_end(request),
        param="messages",
    )


def _end(request: ChatRequest) -> PromptEnd:
    if request.continue_final_message:
        return PromptEnd.INSIDE
    return PromptEnd.MESSAGES if request.add_generation_prompt is False else PromptEnd.ANSWER


async def read_conversation(
    serving: Serving,
    refs: Sequence[ClipRef],
    turns: Callable[[], Sequence[Turn]],
    functions: Sequence[Function],
    *,
    end: PromptEnd = PromptEnd.ANSWER,
    param: str,
) -> tuple[list[Clip], Prompt]:
    """The clips and the prompt of a conversation. Raises ApiError.

    `turns` runs in a thread: it may take a while. `param` names the conversation in what is raised.
    """
    clips = await serving.media.load(refs)
    num_tokens = [clip.num_tokens for clip in clips]
    prompt = await asyncio.to_thread(
        lambda: serving.prompts.chat(turns(), num_tokens, functions, end=end, param=param)
    )
    return clips, prompt


def _clip_refs(messages: Sequence[AnyMessage]) -> list[ClipRef]:
    return [
        ClipRef(part, f"messages[{turn}].content[{index}]")
        for turn, message in enumerate(messages)
        if isinstance(message, Message) and not isinstance(message.content, str)
        for index, part in enumerate(message.content)
        if isinstance(part, AudioPart)
    ]


def _turn(message: AnyMessage) -> Turn:
    """A message as templates know it: `developer` is OpenAI's newer word for `system`."""
    if isinstance(message, CallingMessage):
        calls = tuple(call.called() for call in message.tool_calls)
        return Turn(message.role, texts_of(message.content), calls)
    if isinstance(message, ToolMessage):
        return Turn(message.role, texts_of(message.content), call_id=message.tool_call_id)
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return Turn(role, message.content)
    return Turn(role, tuple(part.text if isinstance(part, TextPart) else AUDIO for part in message.content))


def _echo(turn: Turn) -> str:
    """What an answer continues: the text of a turn of the assistant's."""
    return "".join(part or "" for part in turn.content) if turn.role == "assistant" else ""
