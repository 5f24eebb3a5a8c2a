"""POST /v1/responses: chat, as OpenAI's newer API speaks it.

Items become the turns of a conversation, and the conversation goes chat's way. Nothing is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import aclosing

from starlette.responses import JSONResponse, Response

from model.config import GenerationConfig
from server.api.conversation import read_conversation
from server.generation.replies import Body
from server.generation.serving import Serving
from server.media.loader import ClipRef, all_clips, truncation_header
from server.prompt.chat_template import AUDIO, Turn
from server.requests.content_parts import AudioPart
from server.requests.tool_messages import parse_arguments
from server.responses.builder import ResponseBuilder
from server.responses.schema import (
    CallItem,
    InputContent,
    InputTextPart,
    MessageItem,
    ResponsesRequest,
    ResultItem,
)
from server.responses.stream import ResponseStream
from server.tools.plan import CalledFunction


async def create_response(serving: Serving, request: ResponsesRequest) -> Response:
    """Hear the clips, build the prompt, answer. Raises ApiError, RequestError, EngineDeadError."""
    model = serving.model_name(request.model)
    tools = request.tool_plan
    prompt, recordings = await read_conversation(
        serving,
        list(_clip_refs(request)),
        lambda: _turns(request),
        tools.functions,
        long_audio=request.long_audio,
        param="input",
    )
    generation = await serving.generation(request, prompt, all_clips(recordings), tools)
    head = _head(request, model, serving.defaults)
    builder = ResponseBuilder(head, serving.prompts.tokenizer, generation.usage)
    if request.stream:
        deltas = await serving.begin(generation.deltas())
        stream = ResponseStream(deltas, builder, keep_alive_s=serving.keep_alive_s)
        stream.headers.update(truncation_header(recordings))
        return stream
    async with aclosing(generation.deltas()) as answer:
        async for delta in answer:
            builder.take(delta)
    return JSONResponse(builder.response(), headers=truncation_header(recordings))


def _clip_refs(request: ResponsesRequest) -> Iterator[ClipRef]:
    for index, item in enumerate(request.input if isinstance(request.input, list) else ()):
        if isinstance(item, MessageItem) and isinstance(item.content, list):
            for place, part in enumerate(item.content):
                if isinstance(part, AudioPart):
                    yield ClipRef(part, f"input[{index}].content[{place}]")


def _turns(request: ResponsesRequest) -> list[Turn]:
    turns = [Turn("system", request.instructions)] if request.instructions else []
    if isinstance(request.input, str):
        return [*turns, Turn("user", request.input)]
    for item in request.input:
        match item:
            case MessageItem():
                turns.append(Turn("system" if item.role == "developer" else item.role, _content(item.content)))
            case CallItem():
                call = CalledFunction(item.call_id, item.name, parse_arguments(item.arguments))
                caller = turns.pop() if turns and turns[-1].role == "assistant" else Turn("assistant", "")
                turns.append(Turn("assistant", caller.content, (*caller.calls, call)))
            case ResultItem():
                turns.append(Turn("tool", _content(item.output), call_id=item.call_id))
    return turns


def _content(content: InputContent) -> str | tuple[str | None, ...]:
    if isinstance(content, str):
        return content
    return tuple(part.text if isinstance(part, InputTextPart) else AUDIO for part in content)


def _head(request: ResponsesRequest, model: str, defaults: GenerationConfig) -> Body:
    """What a response repeats of its request, defaults filled in."""
    choice, text = request.tool_choice, request.text
    return {
        "model": model,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "store": False,
        "temperature": defaults.temperature if request.temperature is None else request.temperature,
        "text": {"format": text.format.model_dump(by_alias=True) if text and text.format else {"type": "text"}},
        "tool_choice": (choice or "auto") if isinstance(choice, str | None) else choice.model_dump(),
        "tools": [tool.model_dump() for tool in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": defaults.top_p if request.top_p is None else request.top_p,
        "truncation": "disabled",
    }
