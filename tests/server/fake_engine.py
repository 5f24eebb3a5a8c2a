"""An engine client that follows a script: real asynchrony, failures and aborts, no model."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from engine.errors import EngineClosedError, EngineDeadError
from engine.messages import (
    EngineInfo,
    EngineOutput,
    EngineRequest,
    EngineStats,
    FinishReason,
    RequestTimes,
    TokenLogprobs,
)

INFO = EngineInfo(
    max_model_len=256,
    vocab_size=600,
    device="cpu",
    dtype="float32",
    dtype_reason="fake",
    attention_backend="reference",
    attention_reason="fake",
    num_blocks=1000,
    block_size=16,
    max_num_seqs=8,
    max_num_batched_tokens=512,
    max_num_batched_tokens_reason="fake",
    load_seconds=0.0,
)


@dataclass
class Script:
    """What to answer to one request."""

    token_ids: Sequence[int] = ()
    finish_reason: FinishReason = FinishReason.STOP
    delay_s: float = 0.0
    """Before each token."""
    failure: Exception | None = None
    """Raised after `fail_after` tokens."""
    fail_after: int = 0
    tokens_per_step: int = 1


@dataclass
class FakeEngineClient:
    """Answers each request with `script`, and remembers what it was asked."""

    script: Script = field(default_factory=Script)
    info: EngineInfo = INFO
    stats: EngineStats = field(default_factory=EngineStats)
    requests: list[EngineRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    """Requests that were left before their last choice had ended by itself."""
    ended: list[tuple[str, int]] = field(default_factory=list)
    """Choices that were ended by name."""
    dead: asyncio.Event = field(default_factory=asyncio.Event)
    death: EngineDeadError = field(default_factory=lambda: EngineDeadError("the engine was killed"))
    is_closed: bool = False
    script_of: Callable[[EngineRequest], Script] | None = None
    """Where requests get different answers."""
    num_running: int = 0
    max_running: int = 0

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        self.requests.append(request)
        unfinished = set(range(request.n))
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        try:
            async for output in self._steps(request):
                unfinished -= {index for request_id, index in self.ended if request_id == request.request_id}
                for index in sorted(unfinished):
                    if output.finish_reason is not None:
                        unfinished.discard(index)
                    if (request.request_id, index) not in self.ended:
                        yield dataclasses.replace(output, index=index)
        finally:
            self.num_running -= 1
            if unfinished:
                self.aborted.append(request.request_id)

    def end_choice(self, request_id: str, index: int) -> None:
        self.ended.append((request_id, index))

    async def _steps(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        script = self.script_of(request) if self.script_of else self.script
        queued = time.monotonic()
        ids = list(script.token_ids)[: request.sampling.max_tokens]
        cut = len(ids) < len(script.token_ids)
        for start in range(0, len(ids), script.tokens_per_step):
            await asyncio.sleep(script.delay_s)
            self.check_health()
            if script.failure and start >= script.fail_after:
                raise script.failure
            new = ids[start : start + script.tokens_per_step]
            last = start + script.tokens_per_step >= len(ids)
            reason = (FinishReason.LENGTH if cut else script.finish_reason) if last else None
            stop_id = new[-1] if last and not cut and new[-1] in request.sampling.stop_token_ids else None
            yield EngineOutput(
                request_id=request.request_id,
                new_token_ids=tuple(new),
                logprobs=tuple(self._logprobs(token_id, request) for token_id in new)
                if request.sampling.logprobs is not None
                else (),
                finish_reason=reason,
                stop_token_id=stop_id,
                num_cached_tokens=16 if start == 0 else 0,
                times=RequestTimes(queued, queued, None, time.monotonic()) if start == 0 else None,
            )
        if script.failure:
            raise script.failure

    def _logprobs(self, token_id: int, request: EngineRequest) -> TokenLogprobs:
        top = ((token_id, -0.5), (token_id + 1, float("-inf")))
        return TokenLogprobs(token_id, -0.5, top[: request.sampling.logprobs])

    def check_health(self) -> None:
        if self.is_closed:
            raise EngineClosedError("the engine was closed")
        if self.dead.is_set():
            raise self.death

    async def wait_dead(self) -> str:
        await self.dead.wait()
        return "the engine was killed"

    async def close(self) -> None:
        self.is_closed = True
