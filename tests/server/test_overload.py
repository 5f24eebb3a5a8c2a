"""A server that is full: who is refused, how fast, with what, and that those who were let in are served."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from engine.errors import TimeLimitError
from server.access.admission import PromptQueue
from server.errors import ApiError

from .conftest import Served, Servers, audio_part, user
from .fake_engine import INFO

BODY = {"messages": [user("Hi")]}
CAPACITY = INFO.max_num_seqs + 4


@pytest.fixture(scope="module")
def small(servers: Servers) -> Served:
    """With places for 8 that run and 4 that wait."""
    return servers.start(max_num_queued_reqs=4)


def wait_until_let_in(server: Served) -> None:
    deadline = time.monotonic() + 5
    while server.post(BODY).status_code == 503:
        assert time.monotonic() < deadline, "a place was not given back"
        time.sleep(0.02)


def test_who_comes_first_is_served_and_the_others_hear_at_once(small: Served) -> None:
    small.say("one two three", delay_s=0.15)
    with ThreadPoolExecutor(CAPACITY * 4) as pool:
        answers = list(pool.map(lambda _: small.post(BODY), range(CAPACITY * 4)))
    served = [answer for answer in answers if answer.status_code == 200]
    assert len(served) >= CAPACITY
    assert {answer.json()["choices"][0]["message"]["content"] for answer in served} == {"one two three"}
    refused = [answer for answer in answers if answer.status_code != 200]
    assert refused
    for answer in refused:
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("service_unavailable_error", "server_overloaded")
    assert small.engine.max_running <= CAPACITY
    assert small.post(BODY).status_code == 200


def test_a_full_server_refuses_before_the_body_and_still_answers_questions(small: Served) -> None:
    address = urlsplit(small.url)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    request = head + b"Content-Length: 1000000\r\n\r\n{"
    held = [socket.create_connection((address.hostname, address.port)) for _ in range(CAPACITY)]
    try:
        for connection in held:
            connection.sendall(request)
        time.sleep(0.2)
        with socket.create_connection((address.hostname, address.port), timeout=2) as late:
            late.sendall(request)
            answer = b""
            while not answer.endswith(b"}}"):
                answer += late.recv(4096)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"server_overloaded" in answer
        assert httpx.get(f"{small.url}/ready").status_code == 200
        assert httpx.get(f"{small.url}/v1/models").status_code == 200
    finally:
        for connection in held:
            connection.close()
    wait_until_let_in(small)


def test_a_refused_client_may_finish_its_sentence(small: Served) -> None:
    """Closing on a client that is still sending resets the connection, and it never reads why."""
    address = urlsplit(small.url)
    body = b'{"messages": [], "user": "' + b"a" * 900_000 + b'"}'
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\n"
    request = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body)
    held = [socket.create_connection((address.hostname, address.port)) for _ in range(CAPACITY)]
    try:
        for connection in held:
            connection.sendall(request)
        time.sleep(0.2)
        started = time.monotonic()
        with socket.create_connection((address.hostname, address.port), timeout=5) as late:
            late.sendall(request + body[:1000])
            time.sleep(0.1)
            for start in range(1000, len(body), 100_000):
                late.sendall(body[start : start + 100_000])
            answer = b""
            while piece := late.recv(4096):
                answer += piece
        assert b"server_overloaded" in answer
        assert time.monotonic() - started < 1.5, "the end of the body was not noticed"
    finally:
        for connection in held:
            connection.close()
    wait_until_let_in(small)


def test_prompts_that_wait_are_bounded_in_tokens_and_one_alone_is_not(servers: Servers) -> None:
    small = servers.start(max_num_queued_tokens=100)
    small.say("one two", delay_s=1.0)
    long = {"messages": [user(audio_part(4.0), {"type": "text", "text": "What is said?"})]}  # over 100 tokens
    answers: list[httpx.Response] = []
    first = threading.Thread(target=lambda: answers.append(small.post(long)))
    first.start()
    deadline = time.monotonic() + 5
    while not small.engine.num_running:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started = time.monotonic()
    for stream in (False, True):
        refused = small.post({**BODY, "stream": stream})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_overloaded")
    assert time.monotonic() - started < 0.9
    small.say("Hi")  # to those that come now
    wait_until_let_in(small)  # when the first token has come
    assert small.engine.num_running, "the first has ended"
    first.join(10)
    assert answers[0].status_code == 200


def test_the_queue_of_prompts() -> None:
    queue = PromptQueue(100)
    queue.check_room(1000)
    one, two = queue.enter(40), queue.enter(60)
    with pytest.raises(ApiError):
        queue.check_room(1)
    one.leave()
    one.leave()
    assert queue.num_tokens == 60
    queue.check_room(40)
    with pytest.raises(ApiError):
        queue.check_room(41)
    two.leave()
    assert queue.num_tokens == 0
    PromptQueue().check_room(10**9)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_time_is_up_is_not_tried_again(small: Served, stream: bool) -> None:
    small.say("one two", failure=TimeLimitError("The request took longer than 3 s."))
    before = len(small.engine.requests)
    with pytest.raises(openai.APIStatusError) as caught:
        small.openai.with_options(max_retries=2).chat.completions.create(
            model="tiny-audio", messages=[{"role": "user", "content": "Hi"}], stream=stream
        )
    assert (caught.value.status_code, caught.value.code) == (504, "request_timeout")
    assert len(small.engine.requests) == before + 1


def test_a_stream_whose_time_is_up_ends_with_an_error(small: Served) -> None:
    small.say("one two three", failure=TimeLimitError("The request took longer than 3 s."), fail_after=1)
    events: list[Any] = []
    with pytest.raises(openai.APIError) as caught:
        events.extend(
            small.openai.chat.completions.create(
                model="tiny-audio", messages=[{"role": "user", "content": "Hi"}], stream=True
            )
        )
    assert caught.value.code == "request_timeout"
