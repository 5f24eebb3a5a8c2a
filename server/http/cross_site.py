"""Other people's web pages, where no key stands in their way: a browser on this machine reaches what listens on it.

A page may have its own name resolve to 127.0.0.1 (DNS rebinding), and then reads answers as if they were its own;
and any page may send forms, unread. So a server without keys that listens on this machine alone knows the names by
which it is called, and none without keys takes requests that another origin's page has made.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError
from server.http.middleware import PROBES

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
"""They change nothing, and CORS keeps what they answer from pages."""


class CrossSiteGuard:
    """The middleware, inside RequestScope."""

    def __init__(
        self,
        app: ASGIApp,
        has_keys: Callable[[], bool],
        is_local: bool,
        hosts: Collection[str] = (),
        origins: Collection[str] = (),
    ) -> None:
        """is_local: whether it listens on this machine alone. hosts: its other names. origins: who else may call."""
        self._app = app
        self._has_keys = has_keys
        self._is_local = is_local
        self._hosts = frozenset(host.lower() for host in hosts)
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. Raises ApiError (403)."""
        if scope["type"] == "http" and scope["path"] not in PROBES and not self._has_keys():
            self._check(scope["method"], Headers(scope=scope))
        await self._app(scope, receive, send)

    def _check(self, method: str, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._is_local and not (_is_ours(_name_of(host)) or _name_of(host) in self._hosts):
            raise _refused("Host", "--allowed-hosts", "host_not_allowed")
        origin = headers.get("origin")
        if origin is None or method in SAFE_METHODS or self._origins & {origin, "*"}:
            return
        if urlsplit(origin).netloc.lower() != host.lower():
            raise _refused("Origin", "--allowed-origins", "origin_not_allowed")


def is_loopback(host: str) -> bool:
    """Whether who listens there is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _name_of(host: str) -> str:
    """Without the port."""
    name, _, port = host.rpartition(":")
    return (name if name and port.isdecimal() else host).strip("[]").lower().rstrip(".")


def _is_ours(name: str) -> bool:
    """An address, or a name that nobody else can own: without a dot, or below localhost. No name: no browser."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return "." not in name or name.endswith(".localhost")
    return True


def _refused(header: str, setting: str, code: str) -> ApiError:
    message = (
        f"The request's {header} header names somebody else. A server without API keys takes no requests from other "
        f"people's web pages: set keys, or name it with {setting}."
    )
    return ApiError(403, message, code=code)
