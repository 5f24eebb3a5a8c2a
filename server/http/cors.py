"""Which web pages may call the server from a browser: none, until their origins are named.

Outermost, so that a preflight, which cannot carry a key, is answered for those origins, and they can read errors,
401 included. For all other origins nothing is here: a preflight of theirs gets its 401 like any request.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

METHODS = ("GET", "POST", "DELETE")
EXPOSED_HEADERS = (
    "Retry-After",
    "WWW-Authenticate",
    "X-Audio-Truncated",
    *(
        f"X-Ratelimit-{what}-{unit}"
        for what in ("Limit", "Remaining", "Reset")
        for unit in ("Requests", "Audio-Seconds")
    ),
    "X-Request-Id",
)
"""What pages may read beside the body."""


class Cors:
    """The middleware. Keys go into a header that pages set themselves: no cookies, no credentials."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self._app = app
        self._cors = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        origin = Headers(scope=scope).get("origin") if scope["type"] == "http" else None
        is_allowed = origin is not None and self._cors.is_allowed_origin(origin)
        await (self._cors if is_allowed else self._app)(scope, receive, send)
