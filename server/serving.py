"""What every endpoint that generates shares: the parts it works with, and the way from a prompt to an answer.

Whole or streamed, the first output of the engine is awaited before any header goes out (for at most one
keep-alive interval), so that an early failure keeps its true status.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

from starlette.responses import JSONResponse, Response

from engine.client import EngineClient
from engine.messages import AudioClip, EngineRequest
from model.config import GenerationConfig
from server.channel import Channel
from server.detokenizer import IncrementalDetokenizer
from server.errors import ApiError
from server.generation import Generation, Usage, collect
from server.media import Clip, MediaLoader
from server.prompt import Prompt, PromptBuilder
from server.replies import Reply
from server.sampling import sampling_params
from server.schema import GenerationRequest
from server.streaming import EventStream


@dataclass(frozen=True, slots=True)
class Serving:
    """One checkpoint being served."""

    model_names: tuple[str, ...]
    """Names that requests may use; answers carry the one that was asked for."""
    engine: EngineClient
    prompts: PromptBuilder
    media: MediaLoader
    defaults: GenerationConfig
    """Sampling defaults, end-of-sequence ids included."""
    keep_alive_s: float | None

    def of(self, caller: str) -> Serving:
        """The same, for one caller: ids of uploads in requests are this caller's."""
        return replace(self, media=self.media.of(caller))

    def model_name(self, asked: str | None) -> str:
        """The name to answer with. Raises ApiError when nobody is served under the name asked for."""
        if asked is None:
            return self.model_names[0]
        if asked not in self.model_names:
            message = f"The model '{asked[:100]}' does not exist. This server has: {', '.join(self.model_names)}."
            raise ApiError(404, message, param="model", code="model_not_found")
        return asked

    async def answer(
        self, request: GenerationRequest, prompt: Prompt, clips: Sequence[Clip], reply: Reply
    ) -> Response:
        """Generate, and answer whole or as a stream. Raises ApiError, RequestError, EngineDeadError."""
        generation = self._generation(request, prompt, clips)
        if not request.stream:
            answer = await collect(generation)
            return JSONResponse(reply.whole(answer, generation.usage))
        deltas = Channel(generation.deltas())
        try:
            await deltas.wait_begun(self.keep_alive_s)
        except BaseException:
            await deltas.aclose()
            raise
        return EventStream(
            deltas,
            reply,
            generation.usage,
            include_usage=request.include_usage,
            keep_alive_s=self.keep_alive_s,
        )

    def _generation(self, request: GenerationRequest, prompt: Prompt, clips: Sequence[Clip]) -> Generation:
        info = self.engine.info
        num_prompt_tokens = len(prompt.token_ids)
        sampling = sampling_params(
            request,
            self.defaults,
            room=info.max_model_len - num_prompt_tokens,
            vocab_size=info.vocab_size,
        )
        show_special = request.skip_special_tokens is False
        return Generation(
            engine=self.engine,
            request=EngineRequest(
                request_id=uuid.uuid4().hex,
                prompt_token_ids=prompt.token_ids,
                sampling=sampling,
                clips=tuple(
                    AudioClip(clip.samples, clip.content_hash, offset, clip.num_tokens)
                    for clip, offset in zip(clips, prompt.clip_offsets, strict=True)
                ),
            ),
            detokenizer=IncrementalDetokenizer(
                self.prompts.tokenizer,
                request.stop_strings,
                skip_special_tokens=not show_special,
                include_stop_string=bool(request.include_stop_str_in_output),
                min_tokens=sampling.min_tokens,
            ),
            usage=Usage(num_prompt_tokens, prompt.num_audio_tokens, truncated_audio_s=prompt.truncated_audio_s),
            eos_token_ids=frozenset(self.defaults.eos_token_ids),
            show_stop_token=bool(request.include_stop_str_in_output),
        )
