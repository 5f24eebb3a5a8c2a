"""Slow, endless and malformed requests: what they get, how soon, and that nobody else notices."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time

import httpx
import pytest

from server.http import connection
from server.http.connection import DISCARD_SECONDS, _Phase
from server.http.middleware import MAX_HEADER_BYTES, MAX_HEADERS

from .conftest import Served, user
from .test_closed import connect, exchange, request, status

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"


@pytest.fixture
def hurried(served: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    """The server, with little patience."""
    for phase in _Phase:
        monkeypatch.setitem(connection._SECONDS, phase, 0.3)
    return served


def read_all(sock: socket.socket) -> bytes:
    answer = b""
    while chunk := sock.recv(65536):
        answer += chunk
    return answer


def drip(sock: socket.socket, begin: bytes, piece: bytes, seconds: float = 10) -> bytes:
    """Send a piece every 50 ms until the server answers. -> the answer."""
    sock.sendall(begin)
    sock.settimeout(0.05)
    answer = b""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if not (chunk := sock.recv(65536)):
                return answer
            answer += chunk
        except TimeoutError:
            sock.sendall(piece)
        except ConnectionError:
            return answer
    raise AssertionError("the connection is still open")


def error_of(answer: bytes) -> dict[str, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/json" in head
    assert b"x-request-id" in head
    error: dict[str, str] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (b"POST /v1/chat/comp", b"l"),
        (HEAD, b"X: y\r\n"),
        (HEAD + b"Content-Length: 100000\r\n\r\n{", b" "),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    ],
    ids=["line", "header", "body", "chunks"],
)
def test_what_drips_ends(hurried: Served, begin: bytes, piece: bytes) -> None:
    started = time.monotonic()
    with connect(hurried) as sock:
        answer = drip(sock, begin, piece)
    assert time.monotonic() - started < 5
    assert status(answer) == 408
    assert error_of(answer)["code"] == "request_timeout"
    assert hurried.post({"messages": [user("Hi")]}).status_code == 200


def test_what_says_nothing_ends(hurried: Served) -> None:
    with connect(hurried) as sock:
        assert read_all(sock) == b""


def test_what_follows_an_answer_is_discarded_for_a_while(hurried: Served) -> None:
    with connect(hurried) as sock:
        answer = drip(sock, HEAD.replace(b"json", b"xml") + b"Content-Length: 100000\r\n\r\n", b" ")
    assert status(answer) == 415


def test_a_second_request_has_its_own_time(hurried: Served) -> None:
    with connect(hurried) as sock:
        sock.sendall(request("/v1/models", "GET", body=b""))
        assert status(sock.recv(65536)) == 200
        time.sleep(0.6)  # idle connections have the keep-alive's time
        answer = drip(sock, b"GET /v1/mod", b"e")
    assert status(answer) == 408


def test_a_slow_body_that_moves_is_waited_for(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connection._SECONDS, _Phase.BODY, 0.3)
    body = json.dumps({"messages": [user("Hi")], "user": "x" * 20_000}).encode()
    with connect(served) as sock:
        sock.sendall(HEAD + f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode())
        for start in range(0, len(body), 2000):
            sock.sendall(body[start : start + 2000])
            time.sleep(0.08)
        assert status(read_all(sock)) == 200


def test_a_slow_answer_is_no_slow_request(hurried: Served) -> None:
    hurried.say("Hi", delay_s=0.4)
    assert hurried.post({"messages": [user("Hi")]}).status_code == 200


def test_an_answer_to_an_unread_body_arrives(served: Served) -> None:
    """The connection is not reset under an answer that is on its way."""
    body = b"x" * (900 << 10)
    for _ in range(5):
        response = served.client.post(f"{served.url}/v1/chat/completions", content=body, timeout=DISCARD_SECONDS)
        assert response.status_code == 415


@pytest.mark.parametrize("count", [MAX_HEADERS, 5000])
def test_too_many_header_fields(served: Served, count: int) -> None:
    fields = "".join(f"X-{index}: y\r\n" for index in range(count))
    answer = exchange(served, request("/v1/models", "GET", f"Host: h\r\n{fields}", b""))
    assert status(answer) == 431
    assert error_of(answer)["code"] == "header_too_large"


@pytest.mark.parametrize("size", [MAX_HEADER_BYTES, 200_000, 10 << 20])
@pytest.mark.parametrize("place", ["value", "name", "target", "query"])
def test_too_large_headers(served: Served, size: int, place: str) -> None:
    long = "x" * size
    target = {"target": f"/v1/{long}", "query": f"/v1/models?{long}"}.get(place, "/v1/models")
    field = {"value": f"X: {long}\r\n", "name": f"{long}: x\r\n"}.get(place, "")
    with connect(served) as sock:
        sender = threading.Thread(target=_send, args=(sock, request(target, "GET", f"Host: h\r\n{field}", b"")))
        sender.start()
        answer = read_all(sock)
        sender.join()
    assert status(answer) == 431


def _send(sock: socket.socket, data: bytes) -> None:
    try:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: h\r\nHost: i\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: h\r\nA b: x\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: h\r\nContent-Length: 1e9\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"Transfer-Encoding: gzip\r\n\r\n",
        b"\0" * 100 + b"\r\n\r\n",
    ],
)
def test_what_is_no_http(served: Served, garbage: bytes) -> None:
    with connect(served) as sock:
        sock.sendall(garbage)
        answer = read_all(sock)
    assert status(answer) in (400, 501)
    error_of(answer)


def test_many_slow_clients_keep_nobody_waiting(served: Served) -> None:
    slow = [connect(served) for _ in range(300)]
    try:
        for sock in slow:
            sock.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
        started = time.monotonic()
        assert served.post({"messages": [user("Hi")]}).status_code == 200
        assert httpx.get(f"{served.url}/health").status_code == 200
        assert time.monotonic() - started < 5
    finally:
        for sock in slow:
            sock.close()


def test_an_answer_that_nobody_reads_is_given_up(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else such clients would take all places there are, for as long as they like."""
    monkeypatch.setattr(connection, "UNREAD_SECONDS", 0.3)
    host, port = served.url.removeprefix("http://").split(":")
    num_requests = 400
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(20)
        sock.connect((host, int(port)))
        ask = request("/openapi.json", "GET", body=b"")
        sender = threading.Thread(target=send_quietly, args=(sock, ask * num_requests), daemon=True)
        sender.start()
        time.sleep(2)
        num_answers = 0
        with contextlib.suppress(ConnectionError):
            while chunk := sock.recv(1 << 20):
                num_answers += chunk.count(b"HTTP/1.1 200")
        assert 0 < num_answers < num_requests
    assert httpx.get(f"{served.url}/v1/models").status_code == 200


def send_quietly(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        sock.sendall(data)
