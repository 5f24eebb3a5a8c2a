"""What one caller may take: requests and seconds of audio per minute, and requests at once.

A token bucket for each rate: a minute's worth may be taken at once, and comes back evenly. Audio is charged when its
length is known, which may leave a caller in debt: nothing is refused for its length here, but the next request with
audio waits until the debt is paid. Without API keys all share one quota. Knows nothing of the server's own capacity.
Not locked: use from one event loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import RATE_LIMIT, ApiError

CODE = "rate_limit_exceeded"


@dataclass(frozen=True, slots=True)
class QuotaLimits:
    """Of each caller; None: no limit."""

    requests_per_minute: int | None = None
    audio_seconds_per_minute: float | None = None
    concurrent_requests: int | None = None


NO_LIMITS = QuotaLimits()


class TokenBucket:
    """Holds up to a minute's worth, and may owe."""

    def __init__(self, per_minute: float, now: float) -> None:
        self.per_minute = per_minute
        self._level = per_minute
        self._at = now

    def level(self, now: float) -> float:
        """What is there; below zero: owed."""
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / 60)
        self._at = now
        return self._level

    def take(self, amount: float, now: float) -> None:
        """Take, be it on credit."""
        self._level = self.level(now) - amount

    def seconds_until(self, amount: float, now: float) -> float:
        """When so much will be there."""
        return max(0.0, amount - self.level(now)) * 60 / self.per_minute


@dataclass(slots=True)
class _Account:
    requests: TokenBucket | None
    audio: TokenBucket | None
    num_running: int = 0


class Quotas:
    """The accounts of all callers."""

    def __init__(self, limits: QuotaLimits = NO_LIMITS, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    @property
    def has_limits(self) -> bool:
        """Whether anything can be refused."""
        return self._limits != NO_LIMITS

    @contextmanager
    def place(self, caller: str) -> Iterator[None]:
        """A request's place among its caller's. Raises ApiError (429) when it is one too many."""
        account, now = self._account(caller), self._clock()
        most = self._limits.concurrent_requests
        if most is not None and account.num_running >= most:
            raise _too_many(f"{most} requests at once", 1)
        if account.requests is not None:
            if wait := account.requests.seconds_until(1, now):
                raise _too_many(f"{self._limits.requests_per_minute} requests per minute", wait)
            account.requests.take(1, now)
        account.num_running += 1
        try:
            yield
        finally:
            account.num_running -= 1

    def check_audio(self, caller: str) -> None:
        """Raise ApiError (429) while the caller owes audio. Before any of it is read."""
        bucket = self._account(caller).audio
        if bucket is not None and (wait := bucket.seconds_until(0, self._clock())):
            raise _too_many(f"{bucket.per_minute:g} seconds of audio per minute", wait)

    def charge_audio(self, caller: str, seconds: float) -> None:
        """Count audio that was decoded."""
        if (bucket := self._account(caller).audio) is not None:
            bucket.take(seconds, self._clock())

    def headers(self, caller: str) -> dict[str, str]:
        """What is left, as OpenAI's headers say it; audio in their manner."""
        account, now = self._account(caller), self._clock()
        headers = {}
        for name, bucket in (("requests", account.requests), ("audio-seconds", account.audio)):
            if bucket is not None:
                headers[f"x-ratelimit-limit-{name}"] = f"{bucket.per_minute:g}"
                headers[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level(now))))
                headers[f"x-ratelimit-reset-{name}"] = _duration(bucket.seconds_until(bucket.per_minute, now))
        return headers

    def _account(self, caller: str) -> _Account:
        if caller not in self._accounts:
            limits = self._limits
            self._accounts[caller] = _Account(
                self._bucket(limits.requests_per_minute), self._bucket(limits.audio_seconds_per_minute)
            )
        return self._accounts[caller]

    def _bucket(self, per_minute: float | None) -> TokenBucket | None:
        return None if per_minute is None else TokenBucket(per_minute, self._clock())


class QuotaScope:
    """Round every POST, inside the check of keys: its place, and headers that say what is left."""

    def __init__(self, app: ASGIApp, quotas: Quotas) -> None:
        self._app = app
        self._quotas = quotas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. Raises ApiError (429)."""
        caller = scope.get("state", {}).get("caller")
        if scope["type"] != "http" or scope["method"] != "POST" or caller is None:
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._quotas.headers(caller))
            await send(message)

        try:
            with self._quotas.place(caller):
                await self._app(scope, receive, send_with_headers)
        except ApiError as error:
            raise replace(error, headers={**self._quotas.headers(caller), **error.headers}) from None


def _too_many(limit: str, wait_s: float) -> ApiError:
    seconds = max(1, math.ceil(wait_s))
    message = f"Rate limit reached: at most {limit} are accepted from you. Please try again in {seconds} s."
    return ApiError(429, message, RATE_LIMIT, code=CODE, headers={"Retry-After": str(seconds)})


def _duration(seconds: float) -> str:
    """As OpenAI writes it: 20ms, 1s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(1000 * seconds)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
