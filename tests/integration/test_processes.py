"""Processes that start, fail, are killed and end: what clients see, and the exit status the supervisor sees."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.integration.conftest import ServerProcess, input_audio, run_server, start_server, text, wav
from tests.reference import noise


@pytest.fixture
def server(gqa_folder: Path) -> ServerProcess:
    """A server of this test's own, to be ended."""
    started = start_server("--model", str(gqa_folder), "--served-model-name", "random", "--shutdown-timeout", "30")
    yield started
    started.process.kill()


def long_answer(server: ServerProcess, num_tokens: int = 3000) -> Any:
    """A stream that takes a while."""
    return server.openai.chat.completions.create(
        model="random",
        messages=[{"role": "user", "content": [input_audio(wav(noise(16_000))), text("Go on.")]}],
        stream=True,
        max_tokens=num_tokens,
        extra_body={"ignore_eos": True, "min_tokens": num_tokens},
    )


def wait_until_ready(server: ServerProcess, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while server.http.get("/ready").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ask(server: ServerProcess, clip: dict[str, object]) -> str:
    """A short greedy answer about a clip."""
    answer = server.openai.chat.completions.create(
        model="random",
        messages=[{"role": "user", "content": [clip, text("Go on.")]}],  # type: ignore[misc, list-item]
        max_tokens=8,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    return str(answer.choices[0].message.content)


def test_a_killed_engine_ends_what_it_had_and_the_next_one_answers(server: ServerProcess) -> None:
    upload = server.openai.files.create(file=("a.wav", wav(noise(16_000))), purpose="user_data")
    clip = {"type": "input_audio", "input_audio": {"id": upload.id}}
    before = ask(server, clip)
    stream = long_answer(server)
    next(iter(stream))
    whole: list[httpx.Response] = []
    body = {"messages": [{"role": "user", "content": "Go on."}], "ignore_eos": True, "max_tokens": 3000}
    thread = threading.Thread(target=lambda: whole.append(server.http.post("/v1/chat/completions", json=body)))
    thread.start()
    time.sleep(0.5)
    engine = server.engine_pid()
    os.kill(engine, signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises(openai.APIError) as caught:
        for _ in stream:
            pass
    thread.join(30)
    assert time.monotonic() - killed < 30
    assert caught.value.code == whole[0].json()["error"]["code"] == "engine_unavailable"
    assert (whole[0].status_code, whole[0].headers["retry-after"]) == (503, "5")
    assert server.http.get("/ready").status_code == 503
    assert server.http.get("/health").status_code == 200
    wait_until_ready(server)
    assert ask(server, clip) == before
    assert server.engine_pid() != engine


def test_a_server_that_may_not_restart_its_engine_ends(gqa_folder: Path) -> None:
    server = start_server("--model", str(gqa_folder), "--engine-restarts", "0")
    try:
        os.kill(server.engine_pid(), signal.SIGKILL)
        assert server.process.wait(60) == 1
        assert any("engine has died" in line for line in server.lines)
    finally:
        server.process.kill()


def test_an_interrupted_server_ends_without_a_word(server: ServerProcess) -> None:
    """Ctrl-C reaches the whole group. Nothing is in flight: nobody waits, and no library complains."""
    wait_until_ready(server)
    num_lines = len(server.lines)
    interrupted = time.monotonic()
    for pid in (server.engine_pid(), server.process.pid):
        os.kill(pid, signal.SIGINT)
    assert server.process.wait(30) == 0
    assert time.monotonic() - interrupted < 25  # --shutdown-timeout 30
    assert not [line for line in server.lines[num_lines:] if "leak" in line or "Traceback" in line]


def test_sigterm_drains(server: ServerProcess) -> None:
    stream = long_answer(server, num_tokens=400)
    events = iter(stream)
    next(events)
    server.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 30
    while server.http.get("/ready").status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    refused = server.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    last = [event for event in events if event.choices][-1]
    assert last.choices[0].finish_reason == "length"
    assert server.process.wait(60) == 0


def test_second_signal_ends_at_once(server: ServerProcess) -> None:
    stream = long_answer(server)
    next(iter(stream))
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(10)
    assert not [line for line in server.lines if "Traceback" in line]


def test_disconnects_free_the_engine(reference_server: ServerProcess) -> None:
    body = {"messages": [{"role": "user", "content": "Go on."}], "ignore_eos": True, "max_tokens": 3500}
    url = f"{reference_server.url}/v1/chat/completions"
    for _ in range(8):
        with httpx.stream("POST", url, json={**body, "stream": True}, timeout=60) as stream:
            assert sum(1 for _, line in zip(range(6), stream.iter_lines(), strict=False) if line) == 3
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, timeout=httpx.Timeout(10, read=0.3))
    started = time.monotonic()
    short = reference_server.http.post("/v1/chat/completions", json={**body, "max_tokens": 4})
    assert short.status_code == 200
    assert time.monotonic() - started < 30  # 16 abandoned answers of 3,500 tokens would take minutes


def test_requests_in_flight_do_not_block_health(reference_server: ServerProcess) -> None:
    threads = [threading.Thread(target=lambda: list(long_answer(reference_server, 200))) for _ in range(4)]
    for thread in threads:
        thread.start()
    slowest = 0.0
    with reference_server.http as client:
        for _ in range(50):
            started = time.monotonic()
            assert client.get("/health").status_code == 200
            slowest = max(slowest, time.monotonic() - started)
            time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert slowest < 5.0


def test_start_failures_are_one_sentence(gqa_folder: Path, tmp_path: Path) -> None:
    missing = run_server("--model", str(tmp_path / "nowhere"))
    assert missing.returncode == 1
    assert "nowhere" in missing.stderr
    empty = run_server("--model", str(tmp_path))
    assert empty.returncode == 1
    assert "config.json" in empty.stderr
    cramped = run_server("--model", str(gqa_folder), "--kv-cache-memory-bytes", "1000")
    assert cramped.returncode == 1
    assert "--max-model-len" in cramped.stderr
    unknown = run_server("--no-such-flag")
    assert unknown.returncode == 2
    for run in (missing, empty, cramped, unknown):
        assert "Traceback" not in run.stderr


def test_taken_port_is_refused_before_loading() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = run_server("--port", str(port))
    assert run.returncode == 1
    assert str(port) in run.stderr


def test_help_lists_every_flag() -> None:
    run = run_server("--help")
    assert run.returncode == 0
    for flag in ("--model", "--max-model-len", "--api-key", "--allowed-private-media-hosts", "--attention-backend"):
        assert flag in run.stdout
