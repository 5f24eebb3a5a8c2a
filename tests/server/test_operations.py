"""Models, health, keys, request ids, logs, draining, and the engine's death."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from engine.errors import EngineRestartingError
from server.lifecycle import DrainingServer

from .conftest import Served, Servers, user


@pytest.fixture
def own(servers: Servers) -> Any:
    """Starts servers for one test only."""
    return servers.start


def test_models(served: Served) -> None:
    models = served.openai.models.list().data
    assert [model.id for model in models] == ["tiny-audio"]
    assert models[0].owned_by == "tympan"
    assert served.openai.models.retrieve("tiny-audio").max_model_len == 256
    with pytest.raises(openai.NotFoundError):
        served.openai.models.retrieve("other")


def test_several_names(own: Any) -> None:
    server = own(served_model_name=("Qwen/Qwen2-Audio", "qwen"), generation_config="none")
    server.say("Hi")
    assert server.openai.models.retrieve("Qwen/Qwen2-Audio").id == "Qwen/Qwen2-Audio"
    for name, shown in (("qwen", "qwen"), (None, "Qwen/Qwen2-Audio")):
        assert server.post({"model": name, "messages": [user("Hi")]}).json()["model"] == shown
    sampling = server.engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty) == (1, 1, 0, 1)
    assert sampling.stop_token_ids


def test_health_and_ready(served: Served) -> None:
    for path in ("/health", "/ready"):
        response = httpx.get(served.url + path)
        assert (response.status_code, response.content) == (200, b"")


def test_request_ids(served: Served) -> None:
    asked = {"x-request-id": "my.id-1"}
    assert httpx.get(f"{served.url}/health", headers=asked).headers["x-request-id"] == "my.id-1"
    for bad in ("a b", "x" * 65, "<script>"):
        made = httpx.get(f"{served.url}/nothing", headers={"x-request-id": bad}).headers["x-request-id"]
        assert made != bad
        assert len(made) == 32


def test_keys(own: Any) -> None:
    server = own(api_key=("one", "two"))
    server.say("Hi")
    body = {"messages": [user("Hi")]}
    for key in ("one", "two"):
        assert server.post(body, headers={"Authorization": f"Bearer {key}"}).status_code == 200
    for headers in (
        {},
        {"Authorization": "Basic one"},
        {"Authorization": "Bearer three"},
        {"Authorization": "Bearer"},
    ):
        response = server.post(body, headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    with pytest.raises(openai.AuthenticationError) as caught:
        server.openai.models.list()
    assert caught.value.code == "invalid_api_key"
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_log_lines_hold_no_content(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        served.post({"messages": [user("my secret")]}, "/v1/chat/completions?token=hidden")
        deadline = time.monotonic() + 5
        while "server.access" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
    ours = "".join(record.getMessage() for record in caplog.records if record.name.startswith("server"))
    assert "POST '/v1/chat/completions' 200" in ours
    assert "secret" not in ours
    assert "hidden" not in ours


def test_dead_engine(own: Any) -> None:
    server = own()
    server.say("Hi")
    server.engine.dead.set()
    response = server.post({"messages": [user("Hi")]})
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "service_unavailable_error"
    assert response.json()["error"]["code"] == "engine_unavailable"
    assert int(response.headers["retry-after"]) > 0
    assert httpx.get(f"{server.url}/health").status_code == 503
    assert httpx.get(f"{server.url}/ready").status_code == 503


def test_an_engine_that_is_being_started_again(own: Any) -> None:
    """A liveness probe must not end the server in the middle of mending itself."""
    server = own()
    server.engine.death = EngineRestartingError("the engine was killed")
    server.engine.dead.set()
    assert httpx.get(f"{server.url}/health").status_code == 200
    ready = httpx.get(f"{server.url}/ready")
    assert (ready.status_code, ready.headers["retry-after"]) == (503, "5")
    server.say("Hi")
    assert server.post({"messages": [user("Hi")]}).json()["error"]["code"] == "engine_unavailable"
    server.engine.dead.clear()
    assert server.post({"messages": [user("Hi")]}).status_code == 200
    assert httpx.get(f"{server.url}/ready").status_code == 200


def test_draining_finishes_what_runs_and_refuses_more(own: Any) -> None:
    server = own()
    server.say("one two three four five six seven", delay_s=0.1)
    answers: list[httpx.Response] = []
    running = threading.Thread(target=lambda: answers.append(server.post({"messages": [user("Hi")]})))
    running.start()
    deadline = time.monotonic() + 5
    while not server.engine.requests and time.monotonic() < deadline:
        time.sleep(0.01)
    draining: DrainingServer = server.server
    draining.handle_exit(signal.SIGTERM, None)
    refused = server.post({"messages": [user("Hi")]})
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert httpx.get(f"{server.url}/ready").status_code == 503
    assert httpx.get(f"{server.url}/health").status_code == 200
    running.join(10)
    assert answers[0].json()["choices"][0]["message"]["content"] == "one two three four five six seven"
    deadline = time.monotonic() + 5
    while not draining.should_exit and time.monotonic() < deadline:
        time.sleep(0.01)
    assert draining.should_exit


def test_what_does_not_finish_in_time_is_told(own: Any) -> None:
    server = own(drain_timeout_s=0.5)
    server.say("one two three four five six seven", delay_s=0.4)
    stream = server.openai.chat.completions.create(
        model="tiny-audio", messages=[{"role": "user", "content": "Hi"}], stream=True
    )
    answers: list[httpx.Response] = []
    whole = threading.Thread(target=lambda: answers.append(server.post({"messages": [user("Hi")]})))
    whole.start()
    next(iter(stream))
    wait_until(lambda: len(server.engine.requests) == 2)
    server.server.handle_exit(signal.SIGTERM, None)
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "shutting_down"
    whole.join(5)
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["code"] == "shutting_down"
    wait_until(lambda: server.server.should_exit)


@pytest.mark.parametrize(("number", "grace_s"), [(signal.SIGTERM, 0.6), (signal.SIGINT, 0.0)])
def test_sigterm_leaves_balancers_a_grace_and_a_person_does_not_wait(
    own: Any, number: signal.Signals, grace_s: float
) -> None:
    server = own(drain_grace_s=0.6)
    signalled = time.monotonic()
    server.server.handle_exit(number, None)
    if grace_s:
        refused = server.post({"messages": [user("Hi")]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert httpx.get(f"{server.url}/ready").headers["retry-after"] == "1"
    wait_until(lambda: server.server.should_exit)
    assert grace_s <= time.monotonic() - signalled < grace_s + 0.5


def wait_until(is_so: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)
