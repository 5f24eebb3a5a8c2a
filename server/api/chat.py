"""POST /v1/chat/completions: the decisions between a valid request and its answer."""

from __future__ import annotations

from starlette.responses import Response

from server.api.conversation import read_messages, turn_of
from server.generation.replies import ChatReply
from server.generation.serving import Serving
from server.media.loader import all_clips, truncation_header
from server.prompt.chat_template import Turn
from server.requests.schema import ChatRequest


async def complete_chat(serving: Serving, request: ChatRequest) -> Response:
    """Hear the clips, build the prompt, answer. Raises ApiError, RequestError, EngineDeadError."""
    model = serving.model_name(request.model)
    prompt, recordings = await read_messages(serving, request.messages, request.long_audio, request)
    reply = ChatReply(
        model,
        serving.prompts.tokenizer,
        logprobs=request.num_logprobs is not None,
        n=request.num_choices,
        echoes=(_echo(turn_of(request.messages[-1])) if request.echo else "",),
        prompt_ids=(prompt.token_ids,) if request.return_token_ids else None,
    )
    response = await serving.answer(request, prompt, all_clips(recordings), reply, request.tool_plan)
    response.headers.update(truncation_header(recordings))
    return response


def _echo(turn: Turn) -> str:
    """What an answer continues: the text of a turn of the assistant's."""
    return "".join(part or "" for part in turn.content) if turn.role == "assistant" else ""
