"""Nothing big is done on the event loop: while bodies and files of tens of megabytes come in, it has its time free.

What a callback costs is measured in CPU time of the loop's thread, so that other work on the machine does not show,
and compared with one copy of the body: copying it once on the loop fails.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from .conftest import Served, Servers, text_part, user
from .fake_engine import INFO

TEN_MINUTES = 600 * 16_000
MAX_HEALTH_S = 5.0
"""Hundreds of times what it takes alone: others may be at work on the machine."""
MIN_CALLBACK_S = 0.006
"""What a callback may take whatever it does: the first ones import and compile."""


@pytest.fixture(scope="module")
def ten_minutes() -> NDArray[np.float32]:
    return (0.1 * np.random.default_rng(0).standard_normal(TEN_MINUTES)).astype(np.float32)


@pytest.fixture(scope="module")
def roomy_server(servers: Servers) -> Served:
    server = servers.start(
        info=replace(INFO, max_model_len=4096), max_body_mb=64, max_audio_clip_mb=64, max_stored_audio_mb=64
    )
    server.say("Hello there!")
    return server


def encoded(samples: NDArray[np.float32], container: str, codec: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format=container, subtype=codec)
    return file.getvalue()


class CallbackTimes:
    """The CPU seconds of every callback that runs on an event loop of another thread."""

    def __init__(self) -> None:
        self.longest = 0.0
        self.name = ""

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        run = asyncio.Handle._run
        ours = threading.get_ident()

        def timed(handle: asyncio.Handle) -> None:
            started = time.thread_time()
            run(handle)
            took = time.thread_time() - started
            if took > self.longest and threading.get_ident() != ours:
                self.longest, self.name = took, repr(handle)

        monkeypatch.setattr(asyncio.Handle, "_run", timed)


@pytest.fixture
def callback_times(monkeypatch: pytest.MonkeyPatch) -> Iterator[CallbackTimes]:
    times = CallbackTimes()
    times.watch(monkeypatch)
    gc.collect()
    gc.disable()  # a collection would be counted as the callback's in which it falls
    yield times
    gc.enable()


def seconds_of_a_copy(num_bytes: int) -> float:
    """CPU time, at its best; no less than what small callbacks take."""
    data, best = bytearray(num_bytes), float("inf")
    for _ in range(3):
        started = time.thread_time()
        bytes(data)
        best = min(best, time.thread_time() - started)
    return max(best, 2 * MIN_CALLBACK_S)


def while_health_is_asked(server: Served, content: bytes, path: str, content_type: str) -> httpx.Response:
    """Post in a thread, poll /health in this one."""
    with ThreadPoolExecutor(1) as pool, httpx.Client(trust_env=False) as client:
        headers = {"Content-Type": content_type}
        posting = pool.submit(httpx.post, server.url + path, content=content, headers=headers, timeout=60)
        deadline = time.monotonic() + 60
        while not posting.done() and time.monotonic() < deadline:
            started = time.perf_counter()
            assert client.get(f"{server.url}/health").status_code == 200
            assert time.perf_counter() - started < MAX_HEALTH_S
            time.sleep(0.01)
        return posting.result()


def test_a_body_of_50_megabytes(
    roomy_server: Served, ten_minutes: NDArray[np.float32], callback_times: CallbackTimes
) -> None:
    clip = base64.b64encode(encoded(ten_minutes, "WAV", "FLOAT")).decode()
    part = {"type": "input_audio", "input_audio": {"data": clip, "format": "wav"}}
    request = roomy_server.client.build_request(
        "POST", roomy_server.url, json={"messages": [user(part, text_part("?"))], "long_audio": "truncate"}
    )
    body = request.read()
    assert len(body) > 50e6
    answer = while_health_is_asked(roomy_server, body, "/v1/chat/completions", "application/json")
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-audio-truncated"] == "messages[0].content[0]=600.00->30.00"
    samples = roomy_server.engine.requests[-1].clips[0].samples
    assert samples.tobytes() == ten_minutes[: len(samples)].tobytes()
    assert callback_times.longest < seconds_of_a_copy(len(body)) / 2, callback_times.name


@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/v1/files"])
def test_a_file_of_ten_minutes(
    roomy_server: Served, ten_minutes: NDArray[np.float32], callback_times: CallbackTimes, path: str
) -> None:
    file = encoded(ten_minutes, "MP3")
    fields = {"model": "tiny-audio"} if "audio" in path else {"purpose": "user_data"}
    form = httpx.Request("POST", roomy_server.url, data=fields, files={"file": ("a.mp3", file)})
    content = form.read()
    answer = while_health_is_asked(roomy_server, content, path, form.headers["Content-Type"])
    assert answer.status_code == 200, answer.text
    assert callback_times.longest < seconds_of_a_copy(ten_minutes.nbytes) / 2, callback_times.name
