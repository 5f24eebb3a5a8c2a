"""Requests over bare sockets: a load generator so light that what it measures is the server.

A benchmark of a server on two cores pays for its clients too, and a full HTTP client takes as much of them as the
server's own protocol code does. Bodies are prepared bytes, answers are read and counted, never parsed.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from dataclasses import dataclass
from urllib.parse import urlsplit

READ_BYTES = 1 << 16


@dataclass
class Answer:
    """What came back."""

    status: int = 0
    num_events: int = 0
    """Server-sent ones."""


def json_request(path: str, body: object) -> bytes:
    """A whole POST request."""
    return _request(path, "application/json", json.dumps(body).encode())


def upload_request(path: str, content: bytes, fields: dict[str, str]) -> bytes:
    """A POST request with a form that has a file."""
    boundary = uuid.uuid4().hex
    parts = [f'--{boundary}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items()]
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    body = "".join([*parts, head]).encode() + content + f"\r\n--{boundary}--\r\n".encode()
    return _request(path, f"multipart/form-data; boundary={boundary}", body)


def _request(path: str, content_type: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def send(url: str, request: bytes, answer: Answer | None = None) -> Answer:
    """One request on a connection of its own, to the end of its answer; `answer` counts along while it comes."""
    address = urlsplit(url)
    answer = answer or Answer()
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write(request)
        await writer.drain()
        answer.status = int((await reader.readline()).split()[1])
        while piece := await reader.read(READ_BYTES):
            answer.num_events += piece.count(b"data: ")
    finally:
        writer.close()
    return answer
