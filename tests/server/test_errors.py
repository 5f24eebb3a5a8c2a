"""Bad input: a clear 4xx that names the parameter, in OpenAI's envelope; and the server goes on."""

from __future__ import annotations

import base64
import gzip
import json
import logging
import socket
import struct
from typing import Any

import httpx
import pytest

from .conftest import Served, audio_part, text_part, user, wav_base64


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [user("Hi")], **fields}


def inline(data: bytes | str) -> dict[str, Any]:
    text = data if isinstance(data, str) else base64.b64encode(data).decode()
    return {"messages": [user({"type": "input_audio", "input_audio": {"data": text, "format": "wav"}})]}


def link(url: str) -> dict[str, Any]:
    return {"messages": [user({"type": "audio_url", "audio_url": {"url": url}})]}


def wav_header(*, rate: int = 16_000, channels: int = 1, data: bytes = b"\0\0" * 8000) -> bytes:
    fmt = struct.pack("<HHIIHH", 1, channels, rate, rate * 2 * channels & 0xFFFFFFFF, 2 * channels, 16)
    body = b"WAVEfmt " + struct.pack("<I", 16) + fmt + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


PART = "messages[0].content[0]"
INVALID = {
    "empty messages": (chat(messages=[]), "messages", "empty_array"),
    "no messages": ({}, "messages", "missing_required_parameter"),
    "messages no list": (chat(messages="Hi"), "messages", "invalid_type"),
    "message no object": (chat(messages=["Hi"]), "messages[0]", "invalid_type"),
    "no content": (chat(messages=[{"role": "user"}]), "messages[0].content", "missing_required_parameter"),
    "null content": (chat(messages=[{"role": "user", "content": None}]), "messages[0].content", "invalid_type"),
    "empty content": (chat(messages=[{"role": "user", "content": []}]), "messages[0].content", "empty_array"),
    "unknown role": (chat(messages=[{"role": "pirate", "content": "Hi"}]), "messages[0].role", "invalid_value"),
    "function role": (chat(messages=[{"role": "function", "content": "1"}]), "messages[0].role", "invalid_value"),
    "image": (
        chat(messages=[user(text_part("a"), {"type": "image_url", "image_url": {"url": "x"}})]),
        "messages[0].content[1].type",
        "invalid_value",
    ),
    "unknown part": (chat(messages=[user({"type": "smell"})]), f"{PART}.type", "invalid_value"),
    "part without type": (chat(messages=[user({})]), f"{PART}.type", "missing_required_parameter"),
    "part no object": (chat(messages=[user(3, 4)]), PART, "invalid_type"),
    "text no string": (chat(messages=[user({"type": "text", "text": 3})]), f"{PART}.text", "invalid_type"),
    "audio_url a string": (chat(messages=[user({"type": "audio_url", "audio_url": "x"})]), f"{PART}.audio_url",
                           "invalid_type"),
    "no data": (
        chat(messages=[user({"type": "input_audio", "input_audio": {}})]),
        f"{PART}.input_audio.data",
        "missing_required_parameter",
    ),
    "audio of the system": (
        chat(messages=[{"role": "system", "content": [audio_part()]}]),
        PART,
        "invalid_value",
    ),
    "n zero": (chat(n=0), "n", "integer_below_min_value"),
    "n 129": (chat(n=129), "n", "integer_above_max_value"),
    "n huge": (chat(n=10**9), "n", "integer_above_max_value"),
    "n a float": (chat(n=1.5), "n", "invalid_type"),
    "temperature -1": (chat(temperature=-1), "temperature", "integer_below_min_value"),
    "temperature 2.5": (chat(temperature=2.5), "temperature", "decimal_above_max_value"),
    "temperature a word": (chat(temperature="hot"), "temperature", "invalid_type"),
    "top_p": (chat(top_p=1.5), "top_p", "decimal_above_max_value"),
    "max_tokens": (chat(max_tokens=0), "max_tokens", "integer_below_min_value"),
    "max_tokens a bool": (chat(max_tokens=True), "max_tokens", "invalid_type"),
    "seed": (chat(seed=2**63), "seed", "integer_above_max_value"),
    "penalty": (chat(presence_penalty=3), "presence_penalty", "integer_above_max_value"),
    "five stops": (chat(stop=list("abcde")), "stop", "array_above_max_length"),
    "no stop": (chat(stop=[]), "stop", "empty_array"),
    "empty stop": (chat(stop=["a", ""]), "stop[1]", "empty_string"),
    "long stop": (chat(stop="a" * 5000), "stop", "string_above_max_length"),
    "top_logprobs 21": (chat(logprobs=True, top_logprobs=21), "top_logprobs", "integer_above_max_value"),
    "top_logprobs alone": (chat(top_logprobs=2), "top_logprobs", "invalid_value"),
    "stream_options": (chat(stream_options={"include_usage": True}), "stream_options", "invalid_value"),
    "bias key": (chat(logit_bias={"the": 1}), "logit_bias", "invalid_value"),
    "bias id": (chat(logit_bias={"600": 1}), "logit_bias", "invalid_value"),
    "bias value": (chat(logit_bias={"5": 101}), "logit_bias.5", "integer_above_max_value"),
    "stop id": (chat(stop_token_ids=[600]), "stop_token_ids", "invalid_value"),
    "negative stop id": (chat(stop_token_ids=[-1]), "stop_token_ids[0]", "integer_below_min_value"),
    "min_tokens": (chat(min_tokens=5, max_tokens=4), "min_tokens", "invalid_value"),
    "min_tokens without room": (chat(min_tokens=60_000), "min_tokens", "invalid_value"),
    "min_tokens below the limit": (chat(min_tokens=60_000, max_tokens=70_000), "min_tokens", "invalid_value"),
    "repetition_penalty": (chat(repetition_penalty=0), "repetition_penalty", "integer_below_min_value"),
    "top_k": (chat(top_k=-2), "top_k", "integer_below_min_value"),
    "min_p": (chat(min_p=1.01), "min_p", "decimal_above_max_value"),
    "response_format": (chat(response_format={"type": "xml"}), "response_format.type", "invalid_value"),
    "guided": (chat(guided_json={}), "guided_json", "unsupported_parameter"),
    "audio out": (chat(modalities=["text", "audio"]), "modalities", "unsupported_parameter"),
    "priority false": (chat(priority=False), "priority", "invalid_type"),
    "chat_template": (chat(chat_template="{{ x }}"), "chat_template", "unsupported_parameter"),
    "too long": (chat(messages=[user("word " * 400)]), "messages", "context_length_exceeded"),
    "much too long": (chat(messages=[user("word " * 100_000)]), "messages", "context_length_exceeded"),
    "audio too long for the context": (
        chat(messages=[user(audio_part(9), audio_part(2))]), "messages", "context_length_exceeded"
    ),
    "bad base64": (inline("!!!"), PART, "invalid_base64"),
    "empty audio": (inline(""), PART, "audio_empty"),
    "not audio": (inline(b"hello " * 100), PART, "unsupported_audio"),
    "zero samples": (inline(wav_base64(samples=0)), PART, "audio_empty"),
    "300 channels": (inline(wav_header(channels=300)), PART, None),
    "10 MHz": (inline(wav_header(rate=10_000_000)), PART, None),
    "20 ms": (inline(wav_base64(samples=320)), PART, "audio_too_short"),
    "31 s": ({**inline(wav_base64(31, rate=8000)), "long_audio": "error"}, PART, "audio_too_long"),
    "31 s in a small context": (inline(wav_base64(31, rate=8000)), PART, "context_length_exceeded"),
    "long_audio": (chat(long_audio="shorten"), "long_audio", "invalid_value"),
    "file URL": (link("file:///etc/passwd"), PART, None),
    "loopback": (link("http://127.0.0.1:1/a.wav"), PART, "media_url_refused"),
    "metadata": (link("http://169.254.169.254/latest"), PART, "media_url_refused"),
    "no URL": (link("nonsense"), PART, None),
    "17 clips": (chat(messages=[user(*[audio_part(0.1)] * 17)]), "messages[0].content[16]", "too_many_audio_clips"),
}  # fmt: skip


def check_envelope(response: httpx.Response) -> dict[str, Any]:
    assert len(response.content) < 2048
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in error["message"]
    return error


@pytest.mark.parametrize("name", INVALID)
def test_invalid_requests(served: Served, name: str) -> None:
    body, param, code = INVALID[name]
    response = served.post(body)
    error = check_envelope(response)
    assert response.status_code == 400, error
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert code is None or error["code"] == code, error
    assert not served.engine.requests
    assert served.post(chat()).status_code == 200


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b'{"messages": "\xff"}', b'{"n": 1' + b"0" * 10_000,
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
])  # fmt: skip
def test_malformed_json(served: Served, body: bytes) -> None:
    response = served.post(body)
    error = check_envelope(response)
    assert (response.status_code, error["param"], error["code"]) == (400, None, None)
    assert "JSON" in error["message"]


def test_nan_is_refused_by_name(served: Served) -> None:
    response = served.post('{"messages": [{"role": "user", "content": "Hi"}], "temperature": NaN}')
    assert check_envelope(response)["param"] == "temperature"


def test_input_is_not_echoed(served: Served) -> None:
    secret = "s3cr3t" * 1000
    for body in (chat(temperature=secret), chat(messages=[user({"type": secret})]), chat(logit_bias={secret: 1000})):
        response = served.post(body)
        assert response.status_code == 400
        assert len(response.content) < 600


def test_limits_are_named(served: Served) -> None:
    body = {**inline(wav_base64(31, rate=8000)), "long_audio": "error"}
    too_long = served.post(body).json()["error"]["message"]
    assert "31.00 s" in too_long
    assert "30 s" in too_long
    context = served.post(chat(messages=[user("word " * 400)])).json()["error"]["message"]
    assert "maximum context length is 256 tokens" in context


def test_unknown_model_route_and_method(served: Served) -> None:
    response = served.post(chat(model="gpt-4o"))
    error = check_envelope(response)
    assert (response.status_code, error["param"], error["code"]) == (404, "model", "model_not_found")
    response = served.post({}, "/v1/nothing")
    assert response.status_code == 404
    check_envelope(response)
    response = httpx.get(f"{served.url}/v1/chat/completions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    check_envelope(response)
    response = httpx.put(f"{served.url}/v1/files/file-1")
    assert (response.status_code, response.headers["allow"]) == (405, "DELETE, GET")


def test_content_type(served: Served) -> None:
    response = served.post(chat(), headers={"Content-Type": "text/plain"})
    assert response.status_code == 415
    check_envelope(response)


def test_compressed_bodies_are_refused_by_name(served: Served) -> None:
    packed = gzip.compress(json.dumps(chat()).encode())
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    forms = {"Content-Type": "multipart/form-data; boundary=b", "Content-Encoding": "br"}
    for path, head in (("/v1/chat/completions", headers), ("/v1/files", forms), ("/v1/audio/transcriptions", forms)):
        response = served.client.post(served.url + path, content=packed, headers=head)
        assert response.status_code == 415
        assert "Content-Encoding" in check_envelope(response)["message"]
    plain = served.post(chat(), headers={"Content-Encoding": "identity"})
    assert plain.status_code == 200


def test_body_over_the_cap(served: Served) -> None:
    response = served.post(chat(padding="x" * (1 << 20)))
    assert response.status_code == 413
    assert check_envelope(response)["code"] == "request_too_large"
    assert served.post(chat()).status_code == 200


def test_bodies_of_countless_values(served: Served) -> None:
    response = served.post(b'{"messages": [], "x": [' + b"0," * 520_000 + b"0]}", headers={})
    assert response.status_code == 413
    check_envelope(response)


def test_endless_body_is_cut(served: Served) -> None:
    """No Content-Length to go by: the bytes are counted."""
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        client.sendall((head + "Transfer-Encoding: chunked\r\n\r\n").encode())
        chunk = b"40000\r\n" + b" " * 0x40000 + b"\r\n"
        try:
            for _ in range(64):
                client.sendall(chunk)
        except OSError:
            pass
        try:
            answer = client.recv(65536)
        except OSError:
            answer = b""
    assert b" 413 " in answer or answer == b""
    assert served.post(chat()).status_code == 200


def test_bug_is_told_without_details(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """And logged with what it is and where: its words may be the client's."""
    served.say("Hi", failure=ZeroDivisionError("secret detail"))
    with caplog.at_level(logging.INFO):
        response = served.post(chat())
    assert response.status_code == 500
    assert check_envelope(response)["type"] == "server_error"
    assert "secret" not in response.text
    assert "secret" not in caplog.text
    assert "ZeroDivisionError\n" in caplog.text
    assert "fake_engine.py" in caplog.text


def test_envelope_is_json_even_for_odd_paths(served: Served) -> None:
    response = httpx.get(f"{served.url}/v1/models/%00%ff")
    assert response.status_code == 404
    assert json.loads(response.content)["error"]["code"] == "model_not_found"
