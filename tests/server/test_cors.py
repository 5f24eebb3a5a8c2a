"""Pages of other origins: closed until named, preflights without a key, errors that a page can read."""

from __future__ import annotations

import httpx
import pytest

from .conftest import Served, Servers, user

GOOD, EVIL = "https://app.example", "https://evil.example"
KEY = {"Authorization": "Bearer k"}
BODY = {"messages": [user("Hi")]}


@pytest.fixture(scope="module")
def named(servers: Servers) -> Served:
    return servers.start(api_key=("k",), allowed_origins=(GOOD, "http://localhost:3000"))


def preflight(served: Served, origin: str, method: str = "POST") -> httpx.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }
    return served.client.options(f"{served.url}/v1/chat/completions", headers=headers)


def cors_headers(response: httpx.Response) -> list[str]:
    return [name for name in response.headers if name.startswith("access-control")]


def test_a_preflight_needs_no_key(named: Served) -> None:
    response = preflight(named, GOOD)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == GOOD
    assert "authorization" in response.headers["access-control-allow-headers"]
    assert "POST" in response.headers["access-control-allow-methods"]
    assert "access-control-allow-credentials" not in response.headers
    assert preflight(named, GOOD, "PUT").status_code == 400


@pytest.mark.parametrize(
    "origin", [EVIL, "null", GOOD + ".evil.example", "http://app.example", GOOD.upper(), "*", ""]
)
def test_other_origins_get_what_everybody_gets(named: Served, origin: str) -> None:
    response = preflight(named, origin)
    assert response.status_code == 401
    assert cors_headers(response) == []
    named.say("Hi")
    response = named.post(BODY, headers={"Origin": origin, **KEY})
    assert response.status_code == 200
    assert cors_headers(response) == []


def test_pages_can_read_answers_and_errors(named: Served) -> None:
    named.say("Hi")
    for body, headers, status in (
        (BODY, KEY, 200),
        (BODY, {}, 401),
        ({}, KEY, 400),
        (BODY, {"Authorization": "x"}, 401),
    ):
        response = named.post(body, headers={"Origin": GOOD, **headers})
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == GOOD
        assert "X-Request-Id" in response.headers["access-control-expose-headers"]
        assert response.headers["vary"] == "Origin"


def test_a_preflight_is_no_way_in(named: Served) -> None:
    headers = {"Origin": GOOD, "Access-Control-Request-Method": "GET"}
    for method in ("GET", "POST", "HEAD", "DELETE"):
        response = named.client.request(method, f"{named.url}/v1/models", headers=headers)
        assert response.status_code == 401
    assert named.client.options(f"{named.url}/v1/models", headers={"Origin": GOOD}).status_code == 401


def test_all_origins(servers: Servers) -> None:
    served = servers.start(api_key=("k",), allowed_origins=("*",))
    assert preflight(served, EVIL).status_code == 200
    response = served.post(BODY, headers={"Origin": EVIL})
    assert response.status_code == 401
    assert response.headers["access-control-allow-origin"] == "*"


def test_closed_by_default(served: Served) -> None:
    assert preflight(served, GOOD).status_code == 405
    response = served.post(BODY, headers={"Origin": GOOD})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "origin_not_allowed")
    assert cors_headers(response) == []
