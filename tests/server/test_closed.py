"""Without a key, every way in but /health and /ready answers 401, before the body is read: over raw sockets."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator

import pytest
from fastapi.routing import APIRoute

from server.api.routes import router

from .conftest import Served, Servers

KEY = "s3cr3t"
BODY = b'{"messages": [{"role": "user", "content": "Hi"}]}'
PROBES = ("/health", "/ready")


@pytest.fixture(scope="module")
def closed(servers: Servers) -> Served:
    served = servers.start(api_key=(KEY,))
    served.say("Hi")
    return served


def connect(served: Served) -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=5)


def exchange(served: Served, request: bytes) -> bytes:
    """Send bytes, and read until the answer is whole."""
    with connect(served) as sock:
        sock.sendall(request)
        answer = b""
        while True:
            head, separator, body = answer.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            is_head = request.startswith(b"HEAD")
            if separator and (is_head or (length and len(body) >= int(length[1]))):
                return answer
            if not (chunk := sock.recv(65536)):
                return answer
            answer += chunk


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def request(target: str, method: str = "POST", headers: str = "Host: h\r\n", body: bytes = BODY) -> bytes:
    head = (
        f"{method} {target} HTTP/1.1\r\n{headers}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    return head.encode("latin-1") + b"\r\n" + body


def all_routes() -> Iterator[tuple[str, str]]:
    for route in router.routes:
        if isinstance(route, APIRoute) and route.path not in PROBES:
            for method in (*(route.methods or ()), "HEAD", "OPTIONS", "PUT"):
                yield method, re.sub(r"\{.*?\}", "x", route.path)


TARGETS = [
    *(
        "/docs",
        "/redoc",
        "/openapi.json",
        "/openapi.json/",
        "/metrics",
        "",
        "*",
        "//",
        "/nothing",
        "/V1/MODELS",
    ),
    *("/v1/models/", "//v1/models", "/v1//models", "/./v1/models", "/v1/../v1/models", "/health/../v1/models"),
    *("/%76%31/models", "/v1%2fmodels", "/v1/models%00", "/v1/models%20", "/v1/models;a=b", "/v1/models;/health"),
    *("/%2e/v1/models", "/health%2f..%2fv1%2fmodels", "/health/", "/HEALTH", "/Health", "//health", "/health//"),
    *("/health;x", "/health%00", "/health%2f", "/health%20", "/ready/", "/ready/x", "/health/v1/chat/completions"),
    *(
        "/v1/models?x=/health",
        "/v1/chat/completions?/health",
        "/v1/chat/completions#/health",
        "/v1/chat/completions?",
    ),
    *("http://h/v1/models", "http://h/health", "https://h/ready", "//h/health", "http://health/v1/models"),
    *("/static/../v1/models", "/static/app.js/", "/static/app.js%00", "/static//app.js", "/STATIC/app.js"),
    *("/static", "/v1/models\xff", "/%c0%af", "/%ff", "/\\health", "/v1/models/health", "/v1/files/../../health"),
]
HEADERS = [
    "Host: x/health?\r\n",
    "Host: /health\r\n",
    "Host: h\r\nX-Original-URL: /health\r\nX-Rewrite-URL: /health\r\n",
    "Host: h\r\nX-Forwarded-Prefix: /health\r\nX-Forwarded-For: 127.0.0.1\r\nForwarded: for=127.0.0.1\r\n",
    "Host: h\r\nX-HTTP-Method-Override: GET\r\nX-Forwarded-Uri: /health\r\n",
    "Host: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
    "Host: h\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n",
    "Host: h\r\nOrigin: http://evil.test\r\nAccess-Control-Request-Method: POST\r\n",
    "Host: h\r\nContent-Encoding: gzip\r\n",
    *(
        f"Host: h\r\n{name}: {value}\r\n"
        for name, value in [
            ("Authorization", ""),
            ("Authorization", "Bearer"),
            ("Authorization", "Bearer "),
            ("Authorization", KEY),
            ("Authorization", f"Basic {KEY}"),
            ("Authorization", f"Bearer {KEY}x"),
            ("Authorization", f"Bearer {KEY[:-1]}"),
            ("Authorization", f"Bearer {KEY.upper()}"),
            ("Authorization", f"Bearer {KEY} {KEY}"),
            ("Authorization", f"Bearer {KEY},{KEY}"),
            ("Authorization", f"Bearer\xa0{KEY}"),
            ("Authorization", "Bearer " + "x" * 20_000),
            ("Authorization", "Bearer \xff\xfe"),
            ("Authorization", f"Bearer {KEY}\r\nAuthorization: Bearer wrong"),
            ("Authorization", f"Bearer wrong\r\nAuthorization: Bearer {KEY}"),
            ("Proxy-Authorization", f"Bearer {KEY}"),
            ("X-Api-Key", KEY),
            ("Api-Key", KEY),
            ("Cookie", f"authorization=Bearer {KEY}"),
        ]
    ),
]


def refused(served: Served, answer: bytes, *, or_malformed: bool = False) -> None:
    assert status(answer) == 401 or (or_malformed and status(answer) == 400), answer[:200]
    assert b'"object"' not in answer
    assert not served.engine.requests


@pytest.mark.parametrize(("method", "target"), sorted(set(all_routes())))
def test_every_route(closed: Served, method: str, target: str) -> None:
    refused(closed, exchange(closed, request(target, method)))


@pytest.mark.parametrize(
    "method", ["GET", "POST", "HEAD", "OPTIONS", "DELETE", "TRACE", "PROPFIND", "CONNECT", "get", "X"]
)
@pytest.mark.parametrize("target", ["/v1/chat/completions", "/v1/models", "/nothing"])
def test_every_method(closed: Served, method: str, target: str) -> None:
    refused(closed, exchange(closed, request(target, method)))


@pytest.mark.parametrize("target", TARGETS)
def test_every_spelling(closed: Served, target: str) -> None:
    for method in ("GET", "POST"):
        # What is no request line at all has no route: it gets 400 from the parser.
        refused(closed, exchange(closed, request(target, method)), or_malformed=not target or not target.isascii())


@pytest.mark.parametrize("headers", HEADERS)
def test_every_header(closed: Served, headers: str) -> None:
    for target in ("/v1/chat/completions", "/v1/models"):
        refused(closed, exchange(closed, request(target, headers=headers)))


def test_query_and_body_hold_no_key(closed: Served) -> None:
    body = json.dumps({"api_key": KEY, "messages": [{"role": "user", "content": "Hi"}]}).encode()
    refused(closed, exchange(closed, request(f"/v1/chat/completions?api_key={KEY}&key={KEY}", body=body)))


def test_old_http(closed: Served) -> None:
    refused(closed, exchange(closed, b"GET /v1/models HTTP/1.0\r\n\r\n"))
    refused(closed, exchange(closed, b"GET /v1/models\r\n\r\n"), or_malformed=True)


def test_the_body_is_not_waited_for(closed: Served) -> None:
    for length in (
        "Content-Length: 1000000",
        "Transfer-Encoding: chunked",
        "Expect: 100-continue\r\nContent-Length: 9",
    ):
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n{length}\r\n\r\n"
        started = time.monotonic()
        refused(closed, exchange(closed, head.encode()))
        assert time.monotonic() - started < 8


def test_a_request_behind_a_good_one(closed: Served) -> None:
    good = request("/v1/models", "GET", f"Host: h\r\nAuthorization: Bearer {KEY}\r\n", b"")
    bad = request("/v1/models", "GET", "Host: h\r\nConnection: close\r\n", b"")
    with connect(closed) as sock:
        sock.sendall(good + bad)
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    assert [int(code) for code in re.findall(rb"HTTP/1.1 (\d+)", answer)] == [200, 401]


def test_a_request_inside_a_body(closed: Served) -> None:
    """Smuggling: two lengths that disagree are no request."""
    inner = request("/v1/models", "GET", f"Host: h\r\nAuthorization: Bearer {KEY}\r\n", b"")
    for lengths in (
        f"Content-Length: {len(inner)}\r\nTransfer-Encoding: chunked\r\n",
        f"Content-Length: 0\r\nContent-Length: {len(inner)}\r\n",
        "Transfer-Encoding: chunked, identity\r\n",
    ):
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\n{lengths}\r\n".encode()
        answer = exchange(closed, head + b"0\r\n\r\n" + inner)
        assert status(answer) in (400, 401, 501)


def test_the_probes_are_open(closed: Served) -> None:
    for target in PROBES:
        for headers in ("Host: h\r\n", "Host: h\r\nAuthorization: Bearer wrong\r\n"):
            answer = exchange(closed, request(target, "GET", headers, b""))
            assert status(answer) == 200
            assert answer.endswith(b"\r\n\r\n"), "and tell nothing"


def test_the_key_opens(closed: Served) -> None:
    closed.say("Hi")
    for scheme in ("Bearer", "bearer", "BEARER "):
        headers = f"Host: h\r\nAuthorization: {scheme} {KEY}\r\n"
        assert status(exchange(closed, request("/v1/models", "GET", headers, b""))) == 200
    assert closed.engine.requests == []
