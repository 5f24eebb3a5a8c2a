"""What is known of one HTTP request, from its first byte to its last: what metrics, logs and traces are made of.

It travels with the request: `request.state.record`, then in `Serving`, `MediaLoader` and `Generation`. Times are
seconds of `time.monotonic`, those that the engine stamped included. It holds no text, audio, query or key. What has
to move while a long answer runs goes to its `Meter` at once.
"""

from __future__ import annotations

import time
from asyncio import CancelledError
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from engine.messages import EngineOutput, EngineRequest, FinishReason, RequestTimes, SamplingParams


class Meter(Protocol):
    """Counts what happens while it happens."""

    def first_token(self, generation: GenerationRecord) -> None:
        """The first output of a generation is here."""

    def tokens(self, num_tokens: int, gap_s: float | None) -> None:
        """Tokens of a choice are here, so long after its last ones; None: they are its first."""


class _NoMeter:
    def first_token(self, generation: GenerationRecord) -> None:
        """Nothing."""

    def tokens(self, num_tokens: int, gap_s: float | None) -> None:
        """Nothing."""


NO_METER: Meter = _NoMeter()


class Stage(NamedTuple):
    """Part of the work on a request; several may run side by side."""

    name: str
    began: float
    ended: float


@dataclass(slots=True)
class GenerationRecord:
    """One request to the engine. A context round it: choices that have not ended with it were aborted or failed.

    It keeps nothing of the request itself, whose samples must not live as long as a recording of hours is heard.
    """

    num_prompt_tokens: int
    num_choices: int
    sampling: SamplingParams
    began: float
    """When the caller began to wait: with the HTTP request, or when a window of a recording was sent on."""
    meter: Meter = NO_METER
    times: RequestTimes | None = None
    """Of the choice that began first."""
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    """As they came here; 0: none did."""
    ended: float = 0.0
    num_tokens: int = 0
    """Sampled, over all choices."""
    num_cached_tokens: int = 0
    detokenize_s: float = 0.0
    """With stop strings and tool calls found."""
    finish_reasons: list[str] = field(default_factory=list)
    """Of the choices that have ended."""
    _last_at: dict[int, float] = field(default_factory=dict)

    def take(self, output: EngineOutput) -> None:
        """An output has come."""
        if not output.new_token_ids:
            return
        self.last_token_at = now = time.monotonic()
        if not self.first_token_at:
            self.first_token_at, self.times = now, output.times
            self.num_cached_tokens = output.num_cached_tokens
            self.meter.first_token(self)
        num_tokens = len(output.new_token_ids)
        self.num_tokens += num_tokens
        last = self._last_at.get(output.index)
        self._last_at[output.index] = now
        self.meter.tokens(num_tokens, None if last is None else now - last)

    def finish(self, reason: str) -> None:
        """A choice has ended."""
        self.finish_reasons.append(reason)

    @property
    def stages(self) -> list[Stage]:
        """As the engine and the first and last token tell them; none before there was a token."""
        times = self.times
        if times is None:
            return []
        encode = [Stage("encode", times.encoding[0], sum(times.encoding))] if times.encoding else []
        return [
            Stage("queue", times.queued, times.scheduled),
            *encode,
            Stage("prefill", times.scheduled, times.first_token),
            Stage("generate", times.first_token, max(times.first_token, self.last_token_at)),
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended = time.monotonic()
        is_closed = kind is not None and issubclass(kind, GeneratorExit | CancelledError)
        rest = FinishReason.ABORT if is_closed else FinishReason.ERROR
        self.finish_reasons += [rest] * (self.num_choices - len(self.finish_reasons))


@dataclass(slots=True)
class RequestRecord:
    """See the module's docstring. `stage` and `file` may be called from any thread."""

    request_id: str = ""
    method: str = ""
    route: str = ""
    """The template, not what was asked for: one of a few."""
    path: str = ""
    """As asked for, without the query, at most 200 characters."""
    began: float = field(default_factory=time.monotonic)
    meter: Meter = NO_METER
    traceparent: str | None = None
    tracestate: str | None = None
    """W3C's headers."""
    key_id: str | None = None
    """First 8 digits of the hash of the caller's key."""
    ended: float = 0.0
    status: int = 0
    is_complete: bool = False
    """Whether the answer went out whole."""
    refusal: str | None = None
    """The code of the error that was answered, or its status; a stream's, too, that ended with one."""
    is_broken: bool = False
    """Whether an answer that had begun ended with an error: `status` is that of its beginning."""
    model: str | None = None
    is_stream: bool = False
    stages: list[Stage] = field(default_factory=list)
    files: list[tuple[int, str]] = field(default_factory=list)
    """Bytes and container of each audio file."""
    clip_seconds: list[float] = field(default_factory=list)
    """Of each recording, or window of one, that was decoded or had been."""
    generations: list[GenerationRecord] = field(default_factory=list)

    def stage(self, name: str, began: float, ended: float) -> None:
        """A stage is through."""
        self.stages.append(Stage(name, began, ended))

    def broken(self, reason: str) -> None:
        """The answer, which had begun, ends with an error of this code or status."""
        self.refusal, self.is_broken = reason, True

    def file(self, num_bytes: int, container: str) -> None:
        """An audio file is there."""
        self.files.append((num_bytes, container))

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """A stage is what happens within."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.stage(name, began, time.monotonic())

    def generation(self, request: EngineRequest, began: float) -> GenerationRecord:
        """The record of a request to the engine that begins now."""
        record = GenerationRecord(len(request.prompt_token_ids), request.n, request.sampling, began, self.meter)
        self.generations.append(record)
        return record

    @property
    def all_stages(self) -> list[Stage]:
        """Those of its generations included, in no order."""
        return [*self.stages, *(stage for generation in self.generations for stage in generation.stages)]

    @property
    def is_client_gone(self) -> bool:
        """Whether the client did not wait for the end."""
        return not self.is_complete

    @property
    def first_token_s(self) -> float | None:
        """From the request to its first token."""
        firsts = [generation.first_token_at for generation in self.generations if generation.first_token_at]
        return min(firsts) - self.began if firsts else None


class RequestObserver(Protocol):
    """Who makes something of records."""

    def begin(self, record: RequestRecord) -> None:
        """A request has come; only its head is known."""

    def end(self, record: RequestRecord) -> None:
        """It is over. Must not raise."""
