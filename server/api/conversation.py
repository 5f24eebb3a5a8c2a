"""A conversation as the model reads it: its recordings loaded side by side, its turns rendered and tokenized.

Chat, responses and tokenize bring their own messages or items; from turns and clips on the way is one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from server.generation.serving import Serving
from server.media.loader import ClipRef, Recording, all_clips, check_windows_fit, truncated_seconds
from server.prompt.builder import Prompt
from server.prompt.chat_template import AUDIO, PromptEnd, Turn
from server.requests.content_parts import AudioPart
from server.requests.schema import AnyMessage, LongAudio, Message, Rendering
from server.requests.text_content import TextPart, texts_of
from server.requests.tool_messages import CallingMessage, ToolMessage
from server.tools.plan import Function


async def read_messages(
    serving: Serving,
    messages: Sequence[AnyMessage],
    long_audio: LongAudio | None,
    rendering: Rendering,
) -> tuple[Prompt, list[Recording]]:
    """What the model reads of a conversation, and the recordings in it. Raises ApiError."""
    return await read_conversation(
        serving,
        _clip_refs(messages),
        lambda: [turn_of(message) for message in messages],
        rendering.tool_plan.functions,
        long_audio=long_audio,
        end=_end(rendering),
        param="messages",
    )


def _end(rendering: Rendering) -> PromptEnd:
    if rendering.continue_final_message:
        return PromptEnd.INSIDE
    return PromptEnd.MESSAGES if rendering.add_generation_prompt is False else PromptEnd.ANSWER


async def read_conversation(
    serving: Serving,
    refs: Sequence[ClipRef],
    turns: Callable[[], Sequence[Turn]],
    functions: Sequence[Function],
    *,
    long_audio: LongAudio | None,
    end: PromptEnd = PromptEnd.ANSWER,
    param: str,
) -> tuple[Prompt, list[Recording]]:
    """What the model reads of a conversation, and the recordings in it. Raises ApiError.

    `turns` runs in a thread: it may take a while. `param` names the conversation in what is raised.
    """
    recordings = await serving.media.load(refs, long_audio)
    check_windows_fit(recordings, serving.engine.info.max_model_len)
    num_clips = [len(recording.clips) for recording in recordings]
    clip_tokens = [clip.num_tokens for clip in all_clips(recordings)]

    def build() -> Prompt:
        return serving.prompts.chat(_spread(turns(), num_clips), clip_tokens, functions, end=end, param=param)

    with serving.record.timing("prompt"):
        prompt = await asyncio.to_thread(build)
    return replace(prompt, truncated_audio_s=truncated_seconds(recordings)), recordings


def _clip_refs(messages: Sequence[AnyMessage]) -> list[ClipRef]:
    return [
        ClipRef(part, f"messages[{turn}].content[{index}]")
        for turn, message in enumerate(messages)
        if isinstance(message, Message) and not isinstance(message.content, str)
        for index, part in enumerate(message.content)
        if isinstance(part, AudioPart)
    ]


def turn_of(message: AnyMessage) -> Turn:
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
