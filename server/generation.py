"""From an engine's tokens to the text of an answer: deltas, finish reason, log-probabilities, usage.

Shared by every endpoint, streaming or not. Closing the iterator of deltas (or cancelling who awaits it) closes
the engine's, which aborts the request: the only way to stop one. Knows nothing of HTTP or of answers' shapes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from engine.client import EngineClient
from engine.errors import EngineDeadError
from engine.messages import EngineOutput, EngineRequest, FinishReason, TokenLogprobs
from server.detokenizer import IncrementalDetokenizer


@dataclass(slots=True)
class Usage:
    """Counts of one request, as they stand."""

    prompt_tokens: int
    audio_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    """With the end-of-sequence token."""
    truncated_audio_s: float = 0.0
    """Seconds of audio that the request asked to be left out."""

    def to_json(self) -> dict[str, Any]:
        """As OpenAI writes it, and what was truncated, if anything was."""
        details: dict[str, Any] = {"audio_tokens": self.audio_tokens, "cached_tokens": self.cached_tokens}
        if self.truncated_audio_s:
            details["truncated_audio_seconds"] = round(self.truncated_audio_s, 3)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": details,
        }


@dataclass(frozen=True, slots=True)
class Delta:
    """What the answer grew by. The last delta, and only it, has a finish reason."""

    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Of the tokens since the last delta, when asked for. Their text may have been held back till now."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or token id of the request's own that ended the answer."""


@dataclass(slots=True)
class Generation:
    """One answer in the making. Iterate over `deltas` once."""

    engine: EngineClient
    request: EngineRequest
    detokenizer: IncrementalDetokenizer
    usage: Usage
    eos_token_ids: frozenset[int] = frozenset()
    """Ends that are nobody's stop token: they have no stop reason."""
    show_stop_token: bool = False
    """Whether the text keeps the token that ended it."""
    _pending: list[TokenLogprobs] = field(default_factory=list)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """The answer, piece by piece; steps without visible text give none.

        Raises RequestError and EngineDeadError.
        """
        async with aclosing(self.engine.generate(self.request)) as outputs:
            async for output in outputs:
                delta = self._take(output)
                if delta.text or delta.finish_reason:
                    yield delta
                if delta.finish_reason:
                    return
        raise EngineDeadError("the engine ended an answer without a reason")

    def _take(self, output: EngineOutput) -> Delta:
        self.usage.cached_tokens = max(self.usage.cached_tokens, output.num_cached_tokens)
        text = ""
        for index, token_id in enumerate(output.new_token_ids):
            self.usage.completion_tokens += 1
            self._pending += output.logprobs[index : index + 1]
            is_last = index == len(output.new_token_ids) - 1
            if is_last and output.stop_token_id is not None and not self.show_stop_token:
                break
            text += self.detokenizer.push(token_id)
            if self.detokenizer.stop_string is not None:
                return self._finish(text, FinishReason.STOP, self.detokenizer.stop_string)
        if output.finish_reason is None:
            return Delta(text, self._take_logprobs() if text else ())
        text += self.detokenizer.finish()
        stop_id = None if output.stop_token_id in self.eos_token_ids else output.stop_token_id
        reason = FinishReason.STOP if self.detokenizer.stop_string is not None else output.finish_reason
        return self._finish(text, reason, self.detokenizer.stop_string or stop_id)

    def _finish(self, text: str, reason: FinishReason, stop_reason: str | int | None) -> Delta:
        return Delta(text, self._take_logprobs(), reason, stop_reason)

    def _take_logprobs(self) -> tuple[TokenLogprobs, ...]:
        taken = tuple(self._pending)
        self._pending.clear()
        return taken


async def collect(generation: Generation) -> Delta:
    """The whole answer as one delta. Raises as `Generation.deltas`."""
    text: list[str] = []
    logprobs: list[TokenLogprobs] = []
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            text.append(delta.text)
            logprobs += delta.logprobs
    return Delta("".join(text), tuple(logprobs), delta.finish_reason, delta.stop_reason)
