"""HTTP connections that go only to addresses that were checked.

A name is resolved once per connection, every address in the answer is checked, and the literal that
was checked is dialled: a second lookup could answer differently. Names stay in the URL, so the Host
header, SNI and the certificate check see them. Knows nothing of redirects, sizes or audio.
"""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.cookiejar import CookieJar, DefaultCookiePolicy
from ipaddress import ip_address

import httpcore
import httpx

from audio.address import is_public
from audio.errors import AudioFetchError
from audio.limits import FetchPolicy
from audio.media_url import is_private_host_allowed, normalize_host

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]  # (host, port) -> IP literals

_NUM_RESOLVER_THREADS = 8
_MAX_DIALS = 4  # addresses tried for one name


class SystemResolver:
    """getaddrinfo in threads of its own: slow names must not hold up anything else's thread pool."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(_NUM_RESOLVER_THREADS, thread_name_prefix="audio-dns")

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        answers = await loop.run_in_executor(self._executor, _lookup, host, port)
        return list(dict.fromkeys(answers))

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)


class PinnedBackend(httpcore.AsyncNetworkBackend):
    """Dials only what `is_public`, or the policy's exact exceptions, let through."""

    def __init__(self, policy: FetchPolicy, resolver: Resolver) -> None:
        self._policy = policy
        self._resolver = resolver
        self._dialler = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Raises AudioFetchError `media_url_refused`, or httpcore's connect errors."""
        host = normalize_host(host)
        try:
            async with asyncio.timeout(timeout):
                addresses = await self._checked_addresses(host, port)
                return await self._dial(addresses, port, local_address, socket_options)
        except TimeoutError:
            raise httpcore.ConnectTimeout from None

    async def _checked_addresses(self, host: str, port: int) -> list[str]:
        addresses = [host] if _is_literal(host) else await self._resolve(host, port)
        is_exempt = is_private_host_allowed(host, port, self._policy)
        # One inside address condemns the name: an attacker's server may answer with both kinds.
        if not addresses or not (is_exempt or all(is_public(ip_address(item)) for item in addresses)):
            raise _not_public()
        return list(addresses)

    async def _resolve(self, host: str, port: int) -> Sequence[str]:
        try:
            return await self._resolver(host, port)
        except (OSError, UnicodeError):
            # As for an inside address: the difference would let a client list the inside names.
            raise _not_public() from None

    async def _dial(
        self,
        addresses: list[str],
        port: int,
        local_address: str | None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None,
    ) -> httpcore.AsyncNetworkStream:
        options = None if socket_options is None else list(socket_options)
        for address in addresses[:_MAX_DIALS]:
            try:
                return await self._dialler.connect_tcp(
                    address, port, local_address=local_address, socket_options=options
                )
            except httpcore.ConnectError:
                continue
        raise httpcore.ConnectError("no address answered")


class PinnedTransport(httpx.AsyncHTTPTransport):
    """httpx's own transport on a `PinnedBackend`. Ignores proxies and the environment."""

    def __init__(self, policy: FetchPolicy, resolver: Resolver, verify: ssl.SSLContext | bool) -> None:
        limits = httpx.Limits(
            max_connections=policy.max_connections, max_keepalive_connections=policy.max_connections // 2
        )
        super().__init__(verify=verify, trust_env=False, http2=False, retries=0, limits=limits)
        # httpcore takes the backend as an argument, but httpx offers no way to pass it.
        assert isinstance(self._pool, httpcore.AsyncConnectionPool)
        self._pool._network_backend = PinnedBackend(policy, resolver)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request. Cancelling it leaves nothing open."""
        try:
            return await super().handle_async_request(request)
        except asyncio.CancelledError:
            await self._close_orphans()
            raise

    async def _close_orphans(self) -> None:
        """httpcore forgets a connection whose request is cancelled just when it is made: open, and in no use."""
        assert isinstance(self._pool, httpcore.AsyncConnectionPool)
        used = [item.connection for item in self._pool._requests]
        for connection in list(self._pool._connections):
            if connection not in used and not connection.is_idle():
                self._pool._connections.remove(connection)
                await connection.aclose()


def no_cookies() -> CookieJar:
    """A jar that keeps nothing: one client serves every user, and must not carry state between them."""
    return CookieJar(policy=DefaultCookiePolicy(allowed_domains=()))


def _lookup(host: str, port: int) -> list[str]:
    return [str(answer[4][0]) for answer in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def _is_literal(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _not_public() -> AudioFetchError:
    return AudioFetchError("media_url_refused", "The audio URL's host has no public address.")
