"""A loopback origin that answers with whatever bytes a test scripts, well-formed or not."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from audio.fetch import MediaFetcher

Script = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Origin:
    """`scripts` maps a path to raw response bytes or to a coroutine that writes them."""

    def __init__(self, scripts: dict[str, bytes | Script]) -> None:
        self.scripts = scripts
        self.port = 0
        self.num_connections = 0
        self.requests: list[str] = []

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.requests.append(head)
            script = self.scripts[head.split(" ")[1]]
            if isinstance(script, bytes):
                writer.write(script)
                await writer.drain()
            else:
                await script(writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client hung up, as some tests want it to
        finally:
            writer.close()


def response(body: bytes = b"", status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def redirect(location: str) -> bytes:
    return response(b"", "302 Found", f"Location: {location}")


@asynccontextmanager
async def serving(scripts: dict[str, bytes | Script], tls: ssl.SSLContext | None = None) -> AsyncIterator[Origin]:
    origin = Origin(scripts)
    server = await asyncio.start_server(origin.handle, "127.0.0.1", 0, ssl=tls)
    origin.port = server.sockets[0].getsockname()[1]
    try:
        yield origin
    finally:
        server.close()


async def body_of(fetcher: MediaFetcher, url: str, scope: str = "") -> bytes:
    """What it fetches."""
    with await fetcher.fetch(url, scope) as file:
        return file.read()
