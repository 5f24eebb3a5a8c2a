"""From an engine's tokens to the text of an answer: deltas, finish reason, log-probabilities, usage.

Shared by every endpoint, streaming or not. Closing the iterator of deltas (or cancelling who awaits it) closes
the engine's, which aborts the request: the only way to stop one. A choice that a stop string ends is ended alone
while others go on. Knows nothing of HTTP or of answers' shapes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from engine.client import EngineClient
from engine.errors import EngineDeadError
from engine.messages import EngineOutput, EngineRequest, FinishReason, TokenLogprobs
from server.access.admission import PromptQueue
from server.generation.detokenizer import IncrementalDetokenizer
from server.observe.request_record import GenerationRecord, RequestRecord
from server.tools.parser import CallDelta, StreamingToolParser
from server.tools.plan import TOOL_CALLS


@dataclass(slots=True)
class Usage:
    """Counts of one request, as they stand: its prompts once each, its answers summed."""

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
    """What a choice grew by. The last delta of a choice, and only it, has a finish reason."""

    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Of the tokens since the last delta, when asked for. Their text may have been held back till now."""
    finish_reason: str | None = None
    """FinishReason, or TOOL_CALLS."""
    stop_reason: str | int | None = None
    """The stop string or token id of the request's own that ended the answer."""
    index: int = 0
    """Of the choice."""
    token_ids: tuple[int, ...] = ()
    """Tokens since the last delta, the one that ended the answer included."""
    calls: tuple[CallDelta, ...] = ()
    """What tool calls grew by, after the text."""


@dataclass(slots=True)
class _Choice:
    """One choice in the making: what its next delta has so far."""

    detokenizer: IncrementalDetokenizer
    tool_parser: StreamingToolParser | None
    """Finds calls in the text, where there may be some."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)


def _no_parser() -> None:
    """There are no tools to call."""


@dataclass(slots=True)
class Generation:
    """The answers to one prompt in the making. Iterate over `deltas` once."""

    engine: EngineClient
    request: EngineRequest
    new_detokenizer: Callable[[], IncrementalDetokenizer]
    usage: Usage
    """Shared by all generations of a request."""
    queue: PromptQueue
    """Shared by all requests."""
    new_tool_parser: Callable[[], StreamingToolParser | None] = _no_parser
    """For each choice."""
    first_index: int = 0
    """Of the choices, in the answer to the whole request."""
    eos_token_ids: frozenset[int] = frozenset()
    """Ends that are nobody's stop token: they have no stop reason."""
    show_stop_token: bool = False
    """Whether the text keeps the token that ended it."""
    record: RequestRecord = field(default_factory=RequestRecord)
    """Of the request that it is for."""
    began: float | None = None
    """When the caller began to wait for it (`time.monotonic`); None: with the request."""
    _num_cached_tokens: int = 0

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """The answers, piece by piece; steps without visible text give none.

        Raises RequestError, TimeLimitError and EngineDeadError.
        """
        choices = {index: _Choice(self.new_detokenizer(), self.new_tool_parser()) for index in range(self.request.n)}
        began = self.record.began if self.began is None else self.began
        waiting = self.queue.enter(len(self.request.prompt_token_ids))
        try:
            with self.record.generation(self.request, began) as record:
                async with aclosing(self.engine.generate(self.request)) as outputs:
                    async for output in outputs:
                        waiting.leave()
                        record.take(output)
                        for delta in self._take_all(output, choices[output.index], record):
                            if delta.finish_reason:
                                del choices[output.index]
                                record.finish(delta.finish_reason)
                                if not output.finish_reason:
                                    self.engine.end_choice(self.request.request_id, output.index)
                            if delta.text or delta.calls or delta.finish_reason:
                                yield delta
                        if not choices:
                            return
                raise EngineDeadError("the engine ended an answer without a reason")
        finally:
            waiting.leave()

    def _take_all(self, output: EngineOutput, choice: _Choice, record: GenerationRecord) -> Iterator[Delta]:
        """With tools the tokens are taken one by one: a call may end the answer before the last of them."""
        for piece in (output,) if choice.tool_parser is None else _singly(output):
            began = time.perf_counter()
            delta = self._take(piece, choice)
            record.detokenize_s += time.perf_counter() - began
            yield delta
            if delta.finish_reason:
                return

    def _take(self, output: EngineOutput, choice: _Choice) -> Delta:
        if output.num_cached_tokens > self._num_cached_tokens:
            self.usage.cached_tokens += output.num_cached_tokens - self._num_cached_tokens
            self._num_cached_tokens = output.num_cached_tokens
        text = ""
        detokenizer = choice.detokenizer
        for index, token_id in enumerate(output.new_token_ids):
            self.usage.completion_tokens += 1
            choice.logprobs += output.logprobs[index : index + 1]
            choice.token_ids.append(token_id)
            is_last = index == len(output.new_token_ids) - 1
            if is_last and output.stop_token_id is not None and not self.show_stop_token:
                break
            text += detokenizer.push(token_id)
            if detokenizer.stop_string is not None:
                return self._finish(output, choice, text, FinishReason.STOP, detokenizer.stop_string)
        if output.finish_reason is None:
            return self._grow(output, choice, text)
        text += detokenizer.finish()
        stop_id = None if output.stop_token_id in self.eos_token_ids else output.stop_token_id
        reason = FinishReason.STOP if detokenizer.stop_string is not None else output.finish_reason
        return self._finish(output, choice, text, reason, detokenizer.stop_string or stop_id)

    def _grow(self, output: EngineOutput, choice: _Choice, text: str) -> Delta:
        """What can be shown of an answer that goes on, unless its last call is whole."""
        parser = choice.tool_parser
        if parser is None:
            return self._delta(output, choice, text) if text else Delta()
        parsed = parser.feed(text)
        if parser.is_done:
            return self._delta(output, choice, parsed.text, TOOL_CALLS, calls=parsed.calls)
        if parsed.text or parsed.calls:
            return self._delta(output, choice, parsed.text, calls=parsed.calls)
        return Delta()

    def _finish(
        self,
        output: EngineOutput,
        choice: _Choice,
        text: str,
        reason: FinishReason,
        stop_reason: str | int | None,
    ) -> Delta:
        parser = choice.tool_parser
        if parser is None:
            return self._delta(output, choice, text, reason, stop_reason)
        parsed, rest = parser.feed(text), parser.finish()
        is_called = parser.num_calls > 0 and not parser.is_cut
        has_calls = parser.is_done or (reason is FinishReason.STOP and is_called)
        ended_by = TOOL_CALLS if has_calls else reason
        return self._delta(output, choice, parsed.text + rest.text, ended_by, stop_reason, parsed.calls)

    def _delta(
        self,
        output: EngineOutput,
        choice: _Choice,
        text: str,
        reason: str | None = None,
        stop_reason: str | int | None = None,
        calls: tuple[CallDelta, ...] = (),
    ) -> Delta:
        index = self.first_index + output.index
        delta = Delta(text, tuple(choice.logprobs), reason, stop_reason, index, tuple(choice.token_ids), calls)
        choice.logprobs.clear()
        choice.token_ids.clear()
        return delta


def _singly(output: EngineOutput) -> Iterator[EngineOutput]:
    """The same as outputs of one token each; how it ends is the last one's."""
    last = max(0, len(output.new_token_ids) - 1)
    for index in range(last):
        token_ids, logprobs = output.new_token_ids[index : index + 1], output.logprobs[index : index + 1]
        yield replace(output, new_token_ids=token_ids, logprobs=logprobs, finish_reason=None, stop_token_id=None)
    yield replace(output, new_token_ids=output.new_token_ids[last:], logprobs=output.logprobs[last:])


async def merge(generations: Sequence[Generation]) -> AsyncGenerator[Delta, None]:
    """The deltas of several generations as they come. Closing it closes them all, as does the first failure."""
    queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()

    async def pump(generation: Generation) -> None:
        try:
            async with aclosing(generation.deltas()) as deltas:
                async for delta in deltas:
                    queue.put_nowait(delta)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(generation)) for generation in generations]
    num_left = len(tasks)
    try:
        while num_left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


async def collect(deltas: AsyncGenerator[Delta, None]) -> list[Delta]:
    """Each choice whole, as one delta, in order of index. Raises as `Generation.deltas`."""
    pieces: dict[int, list[Delta]] = {}
    async with aclosing(deltas):
        async for delta in deltas:
            pieces.setdefault(delta.index, []).append(delta)
    return [_join(pieces[index]) for index in sorted(pieces)]


def _join(pieces: Sequence[Delta]) -> Delta:
    last = pieces[-1]
    return Delta(
        "".join(piece.text for piece in pieces),
        tuple(entry for piece in pieces for entry in piece.logprobs),
        last.finish_reason,
        last.stop_reason,
        last.index,
        tuple(token_id for piece in pieces for token_id in piece.token_ids),
        tuple(call for piece in pieces for call in piece.calls),
    )
