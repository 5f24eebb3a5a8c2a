"""Bodies whose long strings are put aside have the values that they had, whatever the cuts; memory is counted."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import resource
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio import FiledText
from server.access.held_bytes import Budget, HeldBytes
from server.errors import ApiError
from server.http import body as body_module
from server.http import json_body
from server.http.json_body import LONG_STRING_BYTES, MAX_TEXT_BYTES, JsonReader

from .conftest import Served, Servers, audio_part, text_part, user, wav_base64
from .fake_engine import INFO

MIB = 1 << 20
WAV_OF_ZEROS = b"RIFF\xff\xff\xff\xffWAVEfmt \x10\0\0\0\1\0\1\0\x80\x3e\0\0\0\x7d\0\0\2\0\x10\0data\xff\xff\xff\xff"

texts = st.text(st.sampled_from('ab\\"/é\n{}[],:🎉'), max_size=40)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(texts.filter(lambda key: len(json.dumps(key)) < 9), inner, max_size=4)
    ),
    max_leaves=12,
)


def read(body: bytes, sizes: list[int]) -> Any:
    reader = JsonReader()
    at = 0
    while at < len(body):
        size = sizes[at % len(sizes)]
        reader.write(body[at : at + size])
        at += size
    return reader.values()


@settings(max_examples=400, deadline=None)
@given(values, st.booleans(), st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_the_values_are_those_of_the_whole_body(value: Any, ascii_only: bool, sizes: list[int]) -> None:
    body = json.dumps({"x": value}, ensure_ascii=ascii_only).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_body, "PIECE_BYTES", 7)
        patch.setattr(json_body, "LONG_STRING_BYTES", 9)
        assert read(body, sizes) == {"x": value}


@pytest.mark.parametrize("escaped", [False, True])
def test_audio_is_put_aside_and_text_is_not(escaped: bool) -> None:
    long = "A/" * LONG_STRING_BYTES
    body = json.dumps(
        {"m": [{"input_audio": {"data": long}}, {"audio_url": {"url": long}}, {"text": long}]}
    ).encode()
    if escaped:
        body = body.replace(b"/", rb"\/")
    reader = JsonReader()
    reader.write(body)
    data, url, text = reader.values()["m"]
    for filed in (data["input_audio"]["data"], url["audio_url"]["url"]):
        assert isinstance(filed, FiledText)
        assert b"".join(filed.pieces()) == long.encode()
    assert text == {"text": long}
    assert len(long) < reader.num_memory_bytes < len(long) * (2 + escaped)
    assert reader.num_disk_bytes >= 3 * len(long) - 3 * json_body.PIECE_BYTES


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"a": "' + b"x" * LONG_STRING_BYTES * 3, 400),
        (b'{"a": "' + b"x" * LONG_STRING_BYTES * 3 + b"\\", 400),
        (b'{"' + b"x" * LONG_STRING_BYTES * 3 + b'": 1}', 400),
        (b'{"a": "' + b"\xff" * LONG_STRING_BYTES * 3 + b'"}', 400),
        (b'{"a": "' + b"\\ud800" * LONG_STRING_BYTES + b'"}', 400),
        (b'{"a": "' + b"\n" * LONG_STRING_BYTES * 3 + b'"}', 400),
        (b'{"a": "' + b"x" * MAX_TEXT_BYTES + b'"}', 413),
        (b'{"a": [' + b"1 , " * (MAX_TEXT_BYTES // 4) + b"]}", 413),
        (b" " * MAX_TEXT_BYTES + b" {}", 413),
    ],
)
def test_what_is_no_json_or_too_much_of_it(body: bytes, status: int) -> None:
    with pytest.raises(ApiError) as caught:
        read(body, [1 << 16])
    assert caught.value.status == status
    assert "xxxx" not in caught.value.message


def test_a_budget_is_shared_and_given_back() -> None:
    memory = Budget(100)
    first, second = HeldBytes(memory), HeldBytes(memory)
    first.hold(memory=60, disk=10)
    with pytest.raises(ApiError) as caught:
        second.hold(memory=41, disk=0)
    assert (caught.value.status, caught.value.code) == (503, "server_overloaded")
    assert caught.value.headers["Retry-After"]
    second.hold(memory=40, disk=0)
    first.hold(memory=10, disk=10)
    second.hold(memory=90, disk=0)
    first.release()
    second.release()
    assert memory.num_bytes == 0


@pytest.mark.parametrize("value", [
    "x" * 3_000_000,
    "x" * 3_000_000 + "\N{PILE OF POO}",
    ["x" * 30_000 + "\N{PILE OF POO}"] * 90,
    [[1_000_000_000 + number] for number in range(100_000)],
], ids=["letters", "letters and an emoji", "short strings", "numbers"])  # fmt: skip
@pytest.mark.parametrize("ascii_only", [True, False])
def test_what_values_take_is_counted(value: Any, ascii_only: bool) -> None:
    """Not what the body took: one emoji makes four bytes of each character beside it."""
    body = json.dumps({"x": value}, ensure_ascii=ascii_only).encode()
    reader = JsonReader()
    tracemalloc.start()
    try:
        reader.write(body)
        values = reader.values()
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert values["x"] == value
    assert taken < 1.7 * reader.num_memory_bytes + 100_000


def test_large_bodies_are_parsed_one_after_the_other(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes several times its size meanwhile. Small ones do not wait for them."""
    served = servers.start(max_num_seqs=16)
    served.say("Hello there!")
    large = json.dumps({"messages": [user("word " * 50_000)]}).encode()
    parsing: list[int] = []
    most: list[int] = []
    is_small_answered = threading.Event()

    def validate(model: Any, reader: JsonReader) -> Any:
        if reader.is_small:
            return validated(model, reader)
        parsing.append(1)
        most.append(len(parsing))
        assert is_small_answered.wait(30)
        parsing.pop()
        return validated(model, reader)

    validated = body_module.validate_json
    monkeypatch.setattr(body_module, "validate_json", validate)
    with ThreadPoolExecutor(6) as pool:
        codes = [pool.submit(code_of, served, large) for _ in range(6)]
        assert served.post({"messages": [user("Hi")]}).status_code == 200
        assert not any(code.done() for code in codes)
        is_small_answered.set()
        assert {code.result() for code in codes} == {"context_length_exceeded"}
    assert most == [1] * 6


def clip_of(num_bytes: int) -> str:
    return base64.b64encode(WAV_OF_ZEROS + bytes(num_bytes - len(WAV_OF_ZEROS))).decode()


def audio(data: str) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def code_of(served: Served, body: bytes) -> str:
    """Of the refusal. Sent in small pieces, as the client's memory is measured too."""
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=60)
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    connection.request("POST", "/v1/chat/completions", io.BytesIO(body), headers)
    with connection.getresponse() as answer:
        code: str = json.loads(answer.read())["error"]["code"]
    connection.close()
    return code


@pytest.fixture(scope="module")
def roomy(servers: Servers) -> Served:
    return servers.start(max_body_mb=64, max_body_memory_mb=2, max_body_disk_mb=200)


def test_bodies_of_audio_take_no_memory(roomy: Served) -> None:
    """Eight of 33 MB at once within a budget of 2 MiB, and little more of the process."""
    body = json.dumps({"messages": [user(audio(clip_of(24 * MIB)), text_part("?"))]}).encode()
    assert code_of(roomy, body) == "audio_too_long"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    num_open = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(5) as pool:
        codes = list(pool.map(lambda _: code_of(roomy, body), range(8)))
    assert codes == ["audio_too_long"] * 8
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 60, f"{grown:.0f} MiB"  # this process is the clients' too
    traffic = roomy.server.config.app.state.traffic  # type: ignore[union-attr]
    assert (traffic.memory.num_bytes, traffic.disk.num_bytes) == (0, 0)
    assert len(os.listdir("/proc/self/fd")) <= num_open + 10  # the clients' connections


def test_decoded_audio_is_bounded_for_all_requests_together(servers: Servers) -> None:
    """Small files may hold hours: a thousand of them at once cost no more than what the setting says."""
    served = servers.start(max_audio_memory_mb=3, max_num_seqs=64, info=replace(INFO, max_model_len=4096))
    served.say("Hello there!", delay_s=0.3)
    clip = user(audio_part(20, rate=8_000), text_part("?"))
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: served.post({"messages": [clip]}), range(4)))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses[0] == 200
    assert statuses[-1] == 503
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert refused.json()["error"]["code"] == "server_overloaded"
    assert refused.headers["retry-after"]
    assert served.post({"messages": [clip]}).status_code == 200
    assert served.post({"messages": [user(audio_part(60, rate=8_000))]}).status_code == 503


def test_a_long_file_takes_turns_where_audio_fills_the_memory(servers: Servers) -> None:
    served = servers.start(max_audio_memory_mb=1, info=replace(INFO, max_model_len=4096))
    served.say("Hello there!", delay_s=0.01)
    file = base64.b64decode(wav_base64(95, rate=8_000))
    answer = served.client.post(
        f"{served.url}/v1/audio/transcriptions",
        files={"file": ("a.wav", file)},
        data={"model": "tiny-audio"},
        timeout=60,
    )
    assert answer.status_code == 200
    assert len(served.engine.requests) >= 4
    assert served.engine.max_running <= 2
