"""The page for people under / and its files under /static/: read once, open to all, answered from memory.

The files know nothing of the server: what they show they ask its API for, with the key of whoever looks at them.
Only the very paths of these files are open, and only to be read; the page may load nothing from elsewhere.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "static"
PAGE = "/"
STATIC = "/static/"
METHODS = frozenset({"GET", "HEAD"})

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".LICENSE": "text/plain; charset=utf-8",
}

WAVEFORM_STYLE = "'sha256-Txpp2hh5OoXvJGhUxJbFyEnnoWJBIRJRY/mg0M3HqKc='"
"""Of the style sheet that vendor/wavesurfer.esm.js puts round a waveform, at the height that waveform.js sets."""
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        f"style-src 'self' {WAVEFORM_STYLE}",
        "img-src 'self'",
        "media-src 'self' blob:",  # clips that are played
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, but asked about: names stay the same when the server is replaced
}


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    etag: str


class Playground:
    """The files and their routes."""

    def __init__(self, *, is_on: bool) -> None:
        """is_on: else there are no files. Raises OSError when one cannot be read."""
        paths = [path for path in sorted(FOLDER.rglob("*")) if path.suffix in MEDIA_TYPES] if is_on else []
        self._files = {_url(path): _read(path) for path in paths}

    @property
    def routes(self) -> list[Route]:
        """One for each file."""
        return [Route(path, self._answer, methods=list(METHODS)) for path in self._files]

    def is_open(self, method: str, path: str) -> bool:
        """Whether a request needs no key."""
        return method in METHODS and path in self._files

    def route_of(self, path: str) -> str | None:
        """What metrics call a file's route; None: it is none of these."""
        if path not in self._files:
            return None
        return PAGE if path == PAGE else f"{STATIC}{{name}}"

    async def _answer(self, request: Request) -> Response:
        file = self._files[request.scope["path"]]
        headers = {**HEADERS, "ETag": file.etag}
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if known & {file.etag, "*"}:
            return Response(status_code=304, headers=headers)
        return Response(file.content, headers=headers, media_type=file.media_type)


def _url(path: Path) -> str:
    return PAGE if path.name == "index.html" else STATIC + path.relative_to(FOLDER).as_posix()


def _read(path: Path) -> _File:
    content = path.read_bytes()
    return _File(content, MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
