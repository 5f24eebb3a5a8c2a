"""Web pages of other people and a server without keys: neither rebinding a name nor sending a form gets them in."""

from __future__ import annotations

import pytest

from .conftest import Served, Servers
from .test_closed import KEY, exchange, request, status

OURS = ["localhost", "localhost:8000", "127.0.0.1:9", "[::1]:8000", "10.1.2.3", "tympan", "TYMPAN:80", "a.localhost"]
OTHERS = [
    "evil.example",
    "evil.example:8000",
    "127.0.0.1.nip.io",
    "localhost.evil.example",
    "evil.example.",
    "a.b:x",
]


def ask(served: Served, headers: str, method: str = "GET", target: str = "/v1/models") -> int:
    return status(exchange(served, request(target, method, headers, b"" if method == "GET" else b"{}")))


@pytest.mark.parametrize("host", OURS)
def test_names_that_are_ours(served: Served, host: str) -> None:
    assert ask(served, f"Host: {host}\r\n") == 200


@pytest.mark.parametrize("host", OTHERS)
def test_a_name_that_was_made_to_point_here(served: Served, host: str) -> None:
    answer = exchange(served, request("/v1/models", "GET", f"Host: {host}\r\n", b""))
    assert status(answer) == 403
    assert b'"host_not_allowed"' in answer
    assert host.encode() not in answer
    assert ask(served, f"Host: {host}\r\n", target="/health") == 200, "probes tell nothing"


@pytest.mark.parametrize(
    ("origin", "is_let_in"),
    [
        ("http://localhost:8000", True),
        ("https://localhost:8000", True),  # behind a proxy with TLS
        ("http://localhost:9000", False),
        ("http://evil.example", False),
        ("null", False),
        ("", False),
    ],
)
def test_a_form_of_another_page(served: Served, origin: str, is_let_in: bool) -> None:
    headers = f"Host: localhost:8000\r\nOrigin: {origin}\r\n"
    assert ask(served, headers, "POST", "/v1/chat/completions") == (400 if is_let_in else 403)
    assert ask(served, headers) == 200, "what a page may ask for it may not read: there is no CORS"
    assert not served.engine.requests


def test_a_key_or_the_settings_let_them_in(servers: Servers) -> None:
    keyed = servers.start(api_key=(KEY,))
    there = "Host: api.example\r\nOrigin: https://app.example\r\n"
    assert ask(keyed, f"{there}Authorization: Bearer {KEY}\r\n", "POST", "/v1/chat/completions") == 400
    named = servers.start(allowed_hosts=("API.example",), allowed_origins=("https://app.example",))
    assert ask(named, there, "POST", "/v1/chat/completions") == 400
    assert ask(named, "Host: other.example\r\n") == 403
    public = servers.start(host="0.0.0.0")
    assert ask(public, "Host: api.example\r\n") == 200
    assert ask(public, there, "POST", "/v1/chat/completions") == 403
