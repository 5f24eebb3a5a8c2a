"""What every endpoint that generates shares: the parts it works with, and the way from a prompt to an answer.

Whole or streamed, the first output of the engine is awaited before any header goes out (for at most one
keep-alive interval), so that an early failure keeps its true status.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from starlette.responses import JSONResponse, Response

from engine.client import EngineClient
from engine.messages import AudioClip, EngineRequest, FinishReason
from model.config import GenerationConfig
from server.access.admission import PromptQueue
from server.access.auth import cache_salt
from server.access.held_bytes import HeldBytes
from server.errors import ApiError
from server.generation.channel import Channel
from server.generation.detokenizer import IncrementalDetokenizer
from server.generation.generation import Delta, Generation, Usage, collect, merge
from server.generation.replies import Reply
from server.generation.sampling import sampling_params
from server.generation.streaming import ReplyStream
from server.media.loader import Clip, MediaLoader
from server.observe.request_record import RequestRecord
from server.prompt.builder import Prompt, PromptBuilder
from server.requests.schema import GenerationRequest
from server.structured.compiler import GrammarCompiler, compile_constraint
from server.structured.tool_calls import compile_calls
from server.tools.plan import NO_TOOLS, ToolPlan


@dataclass(frozen=True, slots=True)
class Serving:
    """One checkpoint being served."""

    model_names: tuple[str, ...]
    """Names that requests may use; answers carry the one that was asked for."""
    engine: EngineClient
    prompts: PromptBuilder
    media: MediaLoader
    grammars: GrammarCompiler
    defaults: GenerationConfig
    """Sampling defaults, end-of-sequence ids included."""
    keep_alive_s: float | None
    queue: PromptQueue
    time_limit_s: float | None = None
    """What the engine may take for one prompt, waiting included."""
    record: RequestRecord = field(default_factory=RequestRecord)
    """Of the request being served."""

    def of(self, caller: str) -> Serving:
        """The same, for one caller: uploads and whatever is cached are this caller's."""
        return replace(self, media=self.media.of(caller), grammars=self.grammars.of(caller))

    def recorded_in(self, record: RequestRecord, held: HeldBytes) -> Serving:
        """The same, for one request, and what it holds."""
        return replace(self, record=record, media=replace(self.media, record=record, held=held))

    def model_name(self, asked: str | None) -> str:
        """The name to answer with. Raises ApiError when nobody is served under the name asked for."""
        if asked is None:
            asked = self.model_names[0]
        if asked not in self.model_names:
            message = f"The model '{asked[:100]}' does not exist. This server has: {', '.join(self.model_names)}."
            raise ApiError(404, message, param="model", code="model_not_found")
        self.record.model = asked
        return asked

    async def answer(
        self,
        request: GenerationRequest,
        prompt: Prompt,
        clips: Sequence[Clip],
        reply: Reply,
        tools: ToolPlan = NO_TOOLS,
    ) -> Response:
        """Generate, and answer whole or as a stream. Raises ApiError, RequestError, EngineDeadError."""
        return await self.answer_all(request, [(prompt, clips)], reply, tools)

    async def answer_all(
        self,
        request: GenerationRequest,
        prompts: Sequence[tuple[Prompt, Sequence[Clip]]],
        reply: Reply,
        tools: ToolPlan = NO_TOOLS,
    ) -> Response:
        """The same for several prompts: choice k of prompt p has the index p * n + k."""
        usage = Usage(
            sum(len(prompt.token_ids) for prompt, _ in prompts),
            sum(prompt.num_audio_tokens for prompt, _ in prompts),
            truncated_audio_s=sum(prompt.truncated_audio_s for prompt, _ in prompts),
        )
        generations = await self._generations(request, prompts, usage, tools)
        num_choices = len(prompts) * request.num_choices
        if request.token_limit == 0:
            source = _nothing(num_choices)
        else:
            source = generations[0].deltas() if len(generations) == 1 else merge(generations)
        if not request.stream:
            return JSONResponse(reply.whole(await collect(source), usage))
        return ReplyStream(
            await self.begin(source),
            reply,
            usage,
            include_usage=request.include_usage,
            keep_alive_s=self.keep_alive_s,
        )

    async def begin(self, source: AsyncGenerator[Delta, None]) -> Channel[Delta]:
        """Start an answer that will be streamed. Raises as its deltas do, if it fails soon."""
        deltas = Channel(source)
        try:
            await deltas.wait_begun(self.keep_alive_s)
        except BaseException:
            await deltas.aclose()
            raise
        return deltas

    async def generation(
        self, request: GenerationRequest, prompt: Prompt, clips: Sequence[Clip], tools: ToolPlan = NO_TOOLS
    ) -> Generation:
        """An answer that has not begun. Raises ApiError for parameters that cannot be honoured."""
        usage = Usage(len(prompt.token_ids), prompt.num_audio_tokens, truncated_audio_s=prompt.truncated_audio_s)
        [generation] = await self._generations(request, [(prompt, clips)], usage, tools)
        return generation

    async def _generations(
        self,
        request: GenerationRequest,
        prompts: Sequence[tuple[Prompt, Sequence[Clip]]],
        usage: Usage,
        tools: ToolPlan,
    ) -> list[Generation]:
        self.queue.check_room(sum(len(prompt.token_ids) for prompt, _ in prompts))
        with self.record.timing("grammar"):
            grammar = await compile_calls(self.grammars, tools, request.answer_schema)
            if grammar is None:
                grammar = await compile_constraint(self.grammars, request)
        new_tool_parser = partial(tools.parser, is_constrained=grammar is not None)
        return [
            replace(
                self._generation(request, prompt, clips, usage, grammar),
                first_index=index * request.num_choices,
                new_tool_parser=new_tool_parser,
            )
            for index, (prompt, clips) in enumerate(prompts)
        ]

    def _generation(
        self,
        request: GenerationRequest,
        prompt: Prompt,
        clips: Sequence[Clip],
        usage: Usage,
        grammar: str | None,
    ) -> Generation:
        info = self.engine.info
        sampling = sampling_params(
            request,
            self.defaults,
            room=info.max_model_len - len(prompt.token_ids),
            vocab_size=info.vocab_size,
            grammar=grammar,
        )
        self.record.is_stream = bool(request.stream)
        show_special = request.skip_special_tokens is False
        salt = cache_salt(self.media.caller, request.cache_salt)
        return Generation(
            engine=self.engine,
            request=EngineRequest(
                request_id=uuid.uuid4().hex,
                prompt_token_ids=prompt.token_ids,
                sampling=sampling,
                clips=tuple(
                    AudioClip(clip.samples, salted(clip, salt), offset, clip.num_tokens)
                    for clip, offset in zip(clips, prompt.clip_offsets, strict=True)
                ),
                n=request.num_choices,
                priority=request.priority or 0,
                cache_salt=salt,
                time_limit_s=self.time_limit_s,
            ),
            new_detokenizer=partial(
                IncrementalDetokenizer,
                self.prompts.tokenizer,
                request.stop_strings,
                skip_special_tokens=not show_special,
                include_stop_string=bool(request.include_stop_str_in_output),
                min_tokens=sampling.min_tokens,
            ),
            usage=usage,
            queue=self.queue,
            eos_token_ids=frozenset(self.defaults.eos_token_ids),
            show_stop_token=bool(request.include_stop_str_in_output),
            record=self.record,
        )


def salted(clip: Clip, salt: str | None) -> str:
    """The encoder cache's key for a clip: only requests with the same salt share its embeddings."""
    return clip.content_hash if salt is None else f"{clip.content_hash}:{salt}"


async def _nothing(num_choices: int) -> AsyncGenerator[Delta, None]:
    """Answers of no tokens: the prompt is all that was asked for."""
    for index in range(num_choices):
        yield Delta(finish_reason=FinishReason.LENGTH, index=index)
