"""Rates and shares of each caller, with a clock that tests move; and over HTTP, what a client sees of them."""

from __future__ import annotations

import base64
import threading
import time
from contextlib import ExitStack
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.access.quota import QuotaLimits, Quotas
from server.errors import ApiError

from .conftest import Served, Servers, audio_part, text_part, user, wav_base64

BODY = {"messages": [user("Hi")]}


class Clock:
    """A monotonic clock that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def admitted(quotas: Quotas, caller: str = "a") -> bool:
    try:
        with quotas.place(caller):
            return True
    except ApiError as error:
        if error.status != 429 or error.code != "rate_limit_exceeded":
            raise
        return False


@given(st.integers(1, 100), st.lists(st.floats(0, 90), min_size=1, max_size=200))
def test_a_rate_holds_whatever_the_pauses(per_minute: int, pauses: list[float]) -> None:
    clock = Clock()
    quotas = Quotas(QuotaLimits(requests_per_minute=per_minute), clock)
    times = []
    for pause in pauses:
        clock.now += pause
        if admitted(quotas):
            times.append(clock.now)
    for first, begin in enumerate(times):
        for last in range(first, len(times)):
            assert last - first + 1 <= per_minute * (1 + (times[last] - begin) / 60) + 1e-6


@given(st.integers(1, 1000))
def test_retry_after_is_the_time_to_wait(per_minute: int) -> None:
    clock = Clock()
    quotas = Quotas(QuotaLimits(requests_per_minute=per_minute), clock)
    while admitted(quotas):
        pass
    with pytest.raises(ApiError) as refusal, quotas.place("a"):
        pass
    clock.now += int(refusal.value.headers["Retry-After"])
    assert admitted(quotas)


def test_a_minutes_worth_at_once_and_then_evenly() -> None:
    clock = Clock()
    quotas = Quotas(QuotaLimits(requests_per_minute=6), clock)
    assert [admitted(quotas) for _ in range(7)] == [True] * 6 + [False]
    assert quotas.headers("a") == {
        "x-ratelimit-limit-requests": "6",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m0s",
    }
    assert admitted(quotas, "b"), "another key has its own"
    clock.now += 10
    assert [admitted(quotas) for _ in range(2)] == [True, False]
    clock.now += 3600
    assert quotas.headers("a")["x-ratelimit-remaining-requests"] == "6"
    assert quotas.headers("a")["x-ratelimit-reset-requests"] == "0ms"


def test_audio_is_taken_on_credit() -> None:
    clock = Clock()
    quotas = Quotas(QuotaLimits(audio_seconds_per_minute=60), clock)
    quotas.check_audio("a")
    quotas.charge_audio("a", 180)
    assert quotas.headers("a")["x-ratelimit-remaining-audio-seconds"] == "0"
    assert quotas.headers("a")["x-ratelimit-reset-audio-seconds"] == "3m0s"
    with pytest.raises(ApiError) as refusal:
        quotas.check_audio("a")
    assert refusal.value.headers["Retry-After"] == "120"
    quotas.check_audio("b")
    clock.now += 119
    with pytest.raises(ApiError):
        quotas.check_audio("a")
    clock.now += 1
    quotas.check_audio("a")


def test_places_are_given_back() -> None:
    quotas = Quotas(QuotaLimits(concurrent_requests=2), Clock())
    with ExitStack() as stack:
        stack.enter_context(quotas.place("a"))
        with quotas.place("a"):
            assert not admitted(quotas)
        with pytest.raises(ZeroDivisionError), quotas.place("a"):
            raise ZeroDivisionError
        assert admitted(quotas)
        assert admitted(quotas, "b")
    assert quotas.headers("a") == {}


# Over HTTP


@pytest.fixture
def start(servers: Servers) -> Any:
    """Starts a server with two keys."""
    return lambda **settings: servers.start(api_key=("a", "b"), **settings)


def post(served: Served, body: dict[str, Any], key: str = "a", path: str = "/v1/chat/completions") -> Any:
    return served.post(body, path, headers={"Authorization": f"Bearer {key}"})


def test_requests_per_minute(start: Any) -> None:
    served = start(max_requests_per_minute=2)
    served.say("Hi")
    assert post(served, BODY).headers["x-ratelimit-remaining-requests"] == "1"
    assert post(served, {}).headers["x-ratelimit-remaining-requests"] == "0"
    refused = post(served, BODY)
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert refused.headers["x-ratelimit-limit-requests"] == "2"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    with pytest.raises(openai.RateLimitError) as caught:
        served.openai.with_options(api_key="a").chat.completions.create(
            model="tiny-audio", messages=BODY["messages"]
        )
    assert caught.value.code == "rate_limit_exceeded"
    assert served.client.get(f"{served.url}/v1/models", headers={"Authorization": "Bearer a"}).status_code == 200
    assert post(served, BODY, "b").status_code == 200
    assert post(served, BODY, "wrong").status_code == 401
    assert len(served.engine.requests) == 2


def test_requests_at_once(start: Any) -> None:
    served = start(max_concurrent_requests_per_key=1)
    served.say("one two three four five", delay_s=0.1)
    statuses: list[int] = []
    body = {**BODY, "stream": True}
    running = threading.Thread(target=lambda: statuses.append(post(served, body).status_code))
    running.start()
    deadline = time.monotonic() + 5
    while not served.engine.requests and time.monotonic() < deadline:
        time.sleep(0.01)
    assert post(served, BODY).status_code == 429
    served.say("Hi")
    assert post(served, BODY, "b").status_code == 200
    running.join(10)
    assert statuses == [200]
    assert post(served, BODY).status_code == 200


@pytest.fixture(scope="module")
def audio_server(servers: Servers) -> Served:
    return servers.start(
        api_key=tuple("abcdef"), max_audio_seconds_per_minute=1, max_audio_seconds_per_request=3, max_model_len=1024
    )


@pytest.mark.parametrize(
    ("key", "path", "field"),
    [("a", "/v1/chat/completions", "messages"), ("b", "/v1/responses", "input"), ("c", "/tokenize", "messages")],
)
def test_audio_per_minute(audio_server: Served, key: str, path: str, field: str) -> None:
    audio_server.say("Hi")
    kind = "input_text" if field == "input" else "text"
    with_audio = {field: [user(audio_part(2.5), {**text_part("Hi"), "type": kind})]}
    first = post(audio_server, with_audio, key, path)
    assert first.status_code == 200
    assert first.headers["x-ratelimit-remaining-audio-seconds"] == "0"
    refused = post(audio_server, with_audio, key, path)
    assert refused.status_code == 429
    assert 30 <= int(refused.headers["retry-after"]) <= 90
    assert post(audio_server, {field: [user("Hi")]}, key, path).status_code == 200, "text goes on"


@pytest.mark.parametrize(
    ("key", "path", "fields"),
    [("d", "/v1/audio/transcriptions", {"model": "tiny-audio"}), ("e", "/v1/files", {"purpose": "user_data"})],
)
def test_files_count_too(audio_server: Served, key: str, path: str, fields: dict[str, str]) -> None:
    audio_server.say("Hi")
    file = ("clip.wav", base64.b64decode(wav_base64(2.5)))
    statuses = [
        audio_server.client.post(
            audio_server.url + path, files={"file": file}, data=fields, headers={"Authorization": f"Bearer {key}"}
        ).status_code
        for _ in range(2)
    ]
    assert statuses == [200, 429]


def test_parts_together(audio_server: Served) -> None:
    before = len(audio_server.engine.requests)
    response = post(audio_server, {"messages": [user(*[audio_part(0.8)] * 5)]}, "f")
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "too_much_audio"
    assert response.json()["error"]["param"].startswith("messages[0].content[")
    assert len(audio_server.engine.requests) == before
