"""Fetches a media link that a stranger chose.

Every hop of a redirect is checked like the first; bytes are counted as they arrive; the whole fetch
has one deadline, because a read timeout never fires on a byte every second. Between fetches only open
connections are remembered, and what a `MediaCache` keeps. The origin's words (body, reason, address) are never
repeated.
"""

import asyncio
import io
import ssl
import tempfile
from typing import IO
from weakref import WeakValueDictionary

import httpx

from audio.errors import AudioFetchError
from audio.limits import MIB, AudioLimits, FetchPolicy
from audio.media_cache import MediaCache
from audio.media_url import host_of, parse_media_url
from audio.transport import PinnedTransport, Resolver, SystemResolver, no_cookies

_HEADERS = {"accept": "audio/*, */*;q=0.5", "accept-encoding": "identity", "user-agent": "tympan"}
_REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})
_IDENTITY_ENCODINGS = frozenset({"", "identity"})
_MAX_SPOOLED_BYTES = MIB


class MediaFetcher:
    """One pooled client for all media links. Use from one event loop; close with `aclose`.

    `cache` keeps answers. `resolver` and `verify` (a TLS context) replace the system's.
    """

    def __init__(
        self,
        policy: FetchPolicy,
        limits: AudioLimits,
        *,
        cache: MediaCache | None = None,
        resolver: Resolver | None = None,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self._policy = policy
        self._limits = limits
        self._cache = cache or MediaCache(0)
        self._system_resolver = SystemResolver() if resolver is None else None
        self._host_slots: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        chosen = resolver or self._system_resolver
        assert chosen is not None
        self._client = httpx.AsyncClient(
            transport=PinnedTransport(policy, chosen, verify),
            headers=_HEADERS,
            cookies=no_cookies(),
            follow_redirects=False,
            trust_env=False,
            timeout=httpx.Timeout(
                connect=policy.connect_timeout_s,
                read=policy.read_timeout_s,
                write=policy.read_timeout_s,
                pool=policy.pool_timeout_s,
            ),
        )

    async def fetch(self, url: str, scope: str = "") -> IO[bytes]:
        """A file of the body behind an http(s) `url`, or of the cached one of the same scope, to be closed.

        Raises AudioSourceError `invalid_audio_url`, AudioFetchError (`media_url_refused`,
        `media_fetch_failed`) or AudioLimitError `audio_too_large`.
        """
        try:
            async with asyncio.timeout(self._policy.total_timeout_s):
                return await self._follow(parse_media_url(url, self._policy), scope)
        except (TimeoutError, httpx.TimeoutException):
            raise _failed("The audio URL did not answer in time.") from None
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError, ValueError, ExceptionGroup):
            raise _failed("The audio URL could not be fetched.") from None

    async def aclose(self) -> None:
        await self._client.aclose()
        if self._system_resolver is not None:
            self._system_resolver.close()

    async def _follow(self, url: httpx.URL, scope: str) -> IO[bytes]:
        for _ in range(self._policy.max_redirects + 1):
            answer = await self._request(url, scope)
            if not isinstance(answer, httpx.URL):
                return answer
            url = answer
        raise _failed("The audio URL redirects too often.")

    async def _request(self, url: httpx.URL, scope: str) -> IO[bytes] | httpx.URL:
        """One hop: the body, or the checked link to go on with."""
        cached = self._cache.get(scope, url)
        if cached is not None and self._cache.is_fresh(cached):
            return io.BytesIO(cached.body)
        host = host_of(url)
        slots = self._host_slots.get(host)
        if slots is None:
            slots = self._host_slots[host] = asyncio.Semaphore(self._policy.max_connections_per_host)
        conditions = cached.conditions if cached is not None else {}
        async with slots, self._client.stream("GET", url, headers=conditions) as response:
            if conditions and response.status_code == httpx.codes.NOT_MODIFIED:
                assert cached is not None
                self._cache.renew(scope, url, cached, response.headers)
                return io.BytesIO(cached.body)
            location = response.headers.get("location")
            if response.status_code in _REDIRECT_STATUSES and location is not None:
                return parse_media_url(location, self._policy, base=url)
            if response.status_code != httpx.codes.OK:
                raise _failed(f"The audio URL answered with HTTP status {response.status_code}.")
            file = await self._read_body(response)
            if self._cache.wants(url, response.headers, file.tell()):
                file.seek(0)
                self._cache.put(scope, url, response.headers, await asyncio.to_thread(file.read))
            else:
                self._cache.drop(scope, url)
            file.seek(0)
            return file

    async def _read_body(self, response: httpx.Response) -> IO[bytes]:
        if response.headers.get("content-encoding", "").strip().lower() not in _IDENTITY_ENCODINGS:
            raise _failed("The audio URL answered with compressed content, which was not asked for.")
        self._limits.check_clip_bytes(int(response.headers.get("content-length", 0)))
        file = tempfile.SpooledTemporaryFile(_MAX_SPOOLED_BYTES)  # noqa: SIM115  closed by whoever gets it
        num_bytes = 0
        try:
            async for chunk in response.aiter_raw():
                num_bytes += len(chunk)
                self._limits.check_clip_bytes(num_bytes)
                if num_bytes > _MAX_SPOOLED_BYTES:  # it is on disk, which may have to be waited for
                    await asyncio.to_thread(file.write, chunk)
                else:
                    file.write(chunk)
        except BaseException:
            file.close()
            raise
        return file


def _failed(message: str) -> AudioFetchError:
    return AudioFetchError("media_fetch_failed", message)
