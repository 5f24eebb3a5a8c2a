"""What was fetched, kept for the next request for the same link: in memory, by caller and URL.

Every caller has a scope of its own and an equal share of the memory: nobody's fetches hit, show or displace those
of another. How long an answer is used unasked is its origin's word (Cache-Control: max-age), at most an hour; after
that, and where the origin says nothing, it is used only if the origin confirms it (ETag, Last-Modified). Links that
carry their own credentials are never kept: who may use them, and how long, is the origin's to say each time. The
longest unused goes first. Not locked: use from one event loop. Knows nothing of sockets.
"""

import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import httpx

MAX_AGE_S = 3600.0
"""That an answer is used unasked, or kept unused."""
_OVERHEAD_BYTES = 1024
_MAX_VALIDATOR_CHARS = 512
_MAX_AGE = re.compile(r"max-age=\"?(\d{1,9})\"?", re.ASCII)
_CREDENTIALS = re.compile(r"auth|credential|expires|jwt|key|passw|policy|secret|session|sig|token", re.IGNORECASE)
"""In the name of a query's parameter: presigned links of all clouds have one of these."""


@dataclass(frozen=True, slots=True)
class CachedMedia:
    """One answer. Times are the cache's clock."""

    body: bytes = field(repr=False)
    fresh_until: float
    kept_until: float
    etag: str | None
    last_modified: str | None

    @property
    def conditions(self) -> dict[str, str]:
        """Request headers that ask whether it is still what the origin has; none if it cannot be asked."""
        headers = {"if-none-match": self.etag, "if-modified-since": self.last_modified}
        return {name: value for name, value in headers.items() if value is not None}

    @property
    def num_held_bytes(self) -> int:
        """What it is charged."""
        return len(self.body) + _OVERHEAD_BYTES


class MediaCache:
    """The answers of all scopes, `max_bytes` together."""

    def __init__(
        self,
        max_bytes: int,
        num_scopes: Callable[[], int] = lambda: 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_bytes = max_bytes
        self._num_scopes = num_scopes
        self._clock = clock
        self._scopes: dict[str, OrderedDict[str, CachedMedia]] = {}
        """By scope and URL; the longest unused first."""

    @property
    def share_bytes(self) -> int:
        """What one scope may hold now."""
        return self._max_bytes // max(1, self._num_scopes())

    def get(self, scope: str, url: httpx.URL) -> CachedMedia | None:
        """What is kept of a link, fresh or not."""
        answers = self._scopes.get(scope, OrderedDict())
        answer = answers.get(_key(url))
        if answer is None or answer.kept_until <= self._clock():
            return None
        answers.move_to_end(_key(url))
        return answer

    def is_fresh(self, answer: CachedMedia) -> bool:
        """Whether it may be used without asking the origin."""
        return self._clock() < answer.fresh_until

    def wants(self, url: httpx.URL, headers: Mapping[str, str], num_bytes: int) -> bool:
        """Whether an answer with a body of so many bytes may be kept and can be of use."""
        return num_bytes + _OVERHEAD_BYTES <= self.share_bytes and self._judged(url, headers, b"") is not None

    def drop(self, scope: str, url: httpx.URL) -> None:
        """Forget what is kept of a link."""
        self._scopes.get(scope, OrderedDict()).pop(_key(url), None)

    def put(self, scope: str, url: httpx.URL, headers: Mapping[str, str], body: bytes) -> None:
        """Keep an answer, if it may be kept and can be of use, in place of the one before."""
        self.drop(scope, url)
        self._drop_expired()
        answer = self._judged(url, headers, body)
        if answer is None or answer.num_held_bytes > self.share_bytes:
            return
        answers = self._scopes.setdefault(scope, OrderedDict())
        while self.num_held_bytes(scope) + answer.num_held_bytes > self.share_bytes:
            answers.popitem(last=False)
        answers[_key(url)] = answer

    def renew(self, scope: str, url: httpx.URL, answer: CachedMedia, headers: Mapping[str, str]) -> None:
        """The origin has confirmed an answer, with these headers (304)."""
        kept = {"etag": answer.etag or "", "last-modified": answer.last_modified or ""}
        self.put(scope, url, {**kept, **{name.lower(): value for name, value in headers.items()}}, answer.body)

    def num_held_bytes(self, scope: str) -> int:
        """What the scope is charged now."""
        return sum(answer.num_held_bytes for answer in self._scopes.get(scope, {}).values())

    def _judged(self, url: httpx.URL, headers: Mapping[str, str], body: bytes) -> CachedMedia | None:
        directives = [part.strip().lower() for part in headers.get("cache-control", "").split(",")]
        if {"no-store", "private"} & set(directives) or headers.get("vary", "").strip() == "*":
            return None
        if any(_CREDENTIALS.search(name) for name in url.params):
            return None
        ages = [match for part in directives if (match := _MAX_AGE.fullmatch(part))]
        max_age = min((float(match[1]) for match in ages), default=0.0)
        age = headers.get("age", "")
        left = max_age - (float(age[:9]) if age.isdecimal() else 0.0)
        if "no-cache" in directives:
            left = 0.0
        etag, last_modified = (_validator(headers.get(name)) for name in ("etag", "last-modified"))
        now = self._clock()
        answer = CachedMedia(body, now + min(left, MAX_AGE_S), now + MAX_AGE_S, etag, last_modified)
        return answer if left > 0 or answer.conditions else None

    def _drop_expired(self) -> None:
        now = self._clock()
        for scope, answers in list(self._scopes.items()):
            for key in [key for key, answer in answers.items() if answer.kept_until <= now]:
                del answers[key]
            if not answers:
                del self._scopes[scope]


def _key(url: httpx.URL) -> str:
    return str(url.copy_with(fragment=None))


def _validator(value: str | None) -> str | None:
    """What may be sent back: printable ASCII of a bounded length."""
    if not value or len(value) > _MAX_VALIDATOR_CHARS or not value.isascii() or not value.isprintable():
        return None
    return value
