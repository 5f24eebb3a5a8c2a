"""Every parameter with every wrong type and every number past its range, made from the server's own document, and
bodies of gigabytes: a 4xx that names the parameter, a small answer, and memory stays where it was.
"""

from __future__ import annotations

import io
import json
import select
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import soundfile

from server.api.openapi import make_document
from server.api.routes import router
from tests.integration.conftest import ServerProcess

DOCUMENT = make_document(router.routes, has_keys=False)
VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 1},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 1},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1]},
}
VALID_FORMS = {
    "/v1/files": {"purpose": "user_data"},
    "/v1/audio/transcriptions": {"max_completion_tokens": "1"},
    "/v1/audio/translations": {"max_completion_tokens": "1"},
}
WAV = io.BytesIO()
soundfile.write(WAV, np.sin(np.arange(8_000) / 9) / 9, 16_000, format="WAV")
SAMPLES: dict[str, Any] = {
    "boolean": True, "integer": 3, "number": 1.5, "string": "x" * 10_000, "array": [[]], "object": {"x": {}},
}  # fmt: skip
MAX_ANSWER_BYTES = 8192
TWO_GB = 2 << 30


def branches(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The alternatives of a schema, pointers followed."""
    if "$ref" in schema:
        yield from branches(DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
    elif "anyOf" in schema or "oneOf" in schema:
        for branch in schema.get("anyOf") or schema["oneOf"]:
            yield from branches(branch)
    else:
        yield schema


def bad_values(schema: dict[str, Any]) -> Iterator[Any]:
    """Values of every type that the schema does not take, and numbers just past its bounds, and far past."""
    taken = list(branches(schema))
    if not all("type" in branch for branch in taken):
        return  # any JSON will do, as far as the schema says
    types = {branch["type"] for branch in taken}
    types |= {"integer"} if "number" in types else set()
    yield from (value for name, value in SAMPLES.items() if name not in types)
    lengths = [branch.get("maxItems") for branch in taken if branch["type"] == "array"]
    if lengths and None not in lengths:  # else a longer list fits another branch
        yield [1] * (max(lengths) + 1)
    for branch in taken:
        if "minimum" in branch:
            yield from (branch["minimum"] - 1, -(10**20))
        if "maximum" in branch:
            yield from (branch["maximum"] + 1, 10**20)
        if branch["type"] == "array" and branch.get("minItems"):
            yield []
        if "enum" in branch or "const" in branch:
            yield "pirate"
        if branch.get("minLength"):
            yield ""
        if "maxLength" in branch:
            yield "x" * (branch["maxLength"] + 1)


def check(response: httpx.Response, name: str, told: Any) -> None:
    assert response.status_code == 400, (name, told, response.text)
    assert len(response.content) < MAX_ANSWER_BYTES
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == name or error["param"].startswith((f"{name}[", f"{name}.")), (name, told, error)
    assert error["code"], (name, told, error)


@pytest.mark.parametrize("path", VALID)
def test_every_parameter_out_of_its_bounds(path: str, reference_server: ServerProcess) -> None:
    body = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    (schema,) = branches(body)
    with reference_server.http as client:
        assert client.post(path, json=VALID[path]).status_code == 200
        num_tried = 0
        for name, field in schema["properties"].items():
            for value in bad_values(field):
                check(client.post(path, json={**VALID[path], name: value}), name, str(value)[:60])
                num_tried += 1
        assert num_tried >= 3 * len(schema["properties"])
        assert client.post(path, json=VALID[path]).status_code == 200


def bad_texts(schema: dict[str, Any]) -> Iterator[str]:
    """The same for a field of a form, where every value is text."""
    is_any_text = any(branch["type"] == "string" and not {"const", "enum"} & branch.keys()
                      for branch in branches(schema))  # fmt: skip
    for value in bad_values(schema):
        if not isinstance(value, (list, dict)) and (isinstance(value, str) or not is_any_text):
            yield str(value)


@pytest.mark.parametrize("path", VALID_FORMS)
def test_every_field_of_a_form_out_of_its_bounds(path: str, reference_server: ServerProcess) -> None:
    schema = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    files = {"file": ("a.wav", WAV.getvalue())}
    with reference_server.http as client:
        assert client.post(path, data=VALID_FORMS[path], files=files).status_code == 200
        num_tried = 0
        for name in schema["properties"].keys() - {"file"}:
            for value in bad_texts(schema["properties"][name]):
                response = client.post(path, data={**VALID_FORMS[path], name: value}, files=files)
                check(response, name, value[:60])
                num_tried += 1
        assert num_tried >= 2 * len(schema["properties"])
        assert client.post(path, data=VALID_FORMS[path], files=files).status_code == 200


@pytest.mark.parametrize(("fields", "param"), [
    ({"n": 10**9}, "n"), ({"stop": list("abcde")}, "stop"), ({"stop": ""}, "stop"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"), ({"stream_options": {}}, "stream_options"),
    ({"messages": [{"role": "pirate", "content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "x" * 9999}]}]}, "messages[0].content[0].type"),
])  # fmt: skip
def test_words_and_combinations(fields: dict[str, Any], param: str, reference_server: ServerProcess) -> None:
    response = reference_server.http.post("/v1/chat/completions", json=VALID["/v1/chat/completions"] | fields)
    check(response, param, fields)


@pytest.mark.parametrize("path", VALID)
def test_deep_nesting(path: str, reference_server: ServerProcess) -> None:
    """Even in a field that nobody reads."""
    body = json.dumps(VALID[path])[:-1] + ', "unread": ' + "[" * 10_000 + "]" * 10_000 + "}"
    headers = {"Content-Type": "application/json"}
    response = reference_server.http.post(path, content=body, headers=headers)
    assert response.status_code == 400
    assert len(response.content) < MAX_ANSWER_BYTES


FORM = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
UPLOADS = {
    "/v1/files": ("multipart/form-data; boundary=b", FORM),
    "/v1/chat/completions": ("application/json", b'{"messages": [{"role": "user", "content": "'),
}


def send(server: ServerProcess, path: str, length: str) -> tuple[bytes, int]:
    """Send up to 2 GB, until an answer comes. -> the answer's beginning, bytes sent."""
    content_type, opening = UPLOADS[path]
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\n{length}\r\n\r\n"
    chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    num_sent = 0
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.sendall(head.encode())
        if "chunked" in length:
            client.sendall(f"{len(opening):x}\r\n".encode() + opening + b"\r\n")
        try:
            while num_sent < TWO_GB and not select.select([client], [], [], 0 if "chunked" in length else 20)[0]:
                client.sendall(chunk)
                num_sent += 1 << 20
            return client.recv(65536), num_sent
        except OSError:  # reset before the answer was read
            return b"", num_sent


@pytest.mark.parametrize("path", UPLOADS)
@pytest.mark.parametrize("length", [f"Content-Length: {TWO_GB}", "Transfer-Encoding: chunked"])
def test_two_gigabytes(path: str, length: str, reference_server: ServerProcess) -> None:
    process = psutil.Process(reference_server.process.pid)
    before = process.memory_info().rss
    answer, num_sent = send(reference_server, path, length)
    assert b" 413 " in answer or (answer == b"" and "chunked" in length)
    assert len(answer) < MAX_ANSWER_BYTES
    assert num_sent < 200 << 20, "the server listened to all of it"
    assert process.memory_info().rss - before < 100 << 20
    chat = "/v1/chat/completions"
    assert reference_server.http.post(chat, json=VALID[chat]).status_code == 200
