"""Forms are read as clients send them, in chunks of any size; what is no form is refused in bounded memory."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from server.access.held_bytes import HeldBytes
from server.errors import ApiError
from server.http.multipart import MAX_FIELD_BYTES, MAX_PARTS, MAX_SPOOLED_BYTES, Form, read_form

NAMES = st.text(st.characters(codec="utf-8", exclude_characters='"\\\r\n%', exclude_categories=["Cc"]), min_size=1)


def encode(data: dict[str, Any], files: dict[str, Any] | None = None) -> tuple[bytes, str]:
    """As httpx, and so openai-python, writes a form."""
    request = httpx.Request("POST", "http://x", data=data, files=files or {"": (None, b"")})
    return request.read(), request.headers["content-type"]


def read(chunks: Iterable[bytes], content_type: str, max_bytes: int = 1 << 30, **headers: str) -> Form:
    queue = iter([*chunks, b""])

    async def receive() -> dict[str, Any]:
        chunk = next(queue)
        return {"type": "http.request", "body": chunk, "more_body": chunk != b""}

    given_headers = {"content-type": content_type, **headers}
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in given_headers.items()]
    return asyncio.run(
        read_form(Request({"type": "http", "headers": raw, "state": {"held": HeldBytes()}}, receive), max_bytes)
    )


def refused(chunks: Iterable[bytes], content_type: str, max_bytes: int = 1 << 30, **headers: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(chunks, content_type, max_bytes, **headers)
    return caught.value


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(NAMES, st.lists(st.text(max_size=20), min_size=1, max_size=3), max_size=4), st.binary(),
       st.integers(1, 50))  # fmt: skip
def test_round_trip_in_chunks_of_any_size(fields: dict[str, list[str]], content: bytes, size: int) -> None:
    fields.pop("file", None)
    body, content_type = encode(fields, {"file": ("a sound.wav", content, "audio/wav")})
    with read([body[start : start + size] for start in range(0, len(body), size)], content_type) as form:
        assert form.fields == fields
        assert form.file.name == "a sound.wav"
        assert form.file.content.read() == content
    assert form.file.content.closed


def test_a_large_file_leaves_memory() -> None:
    content = random.Random(1).randbytes(3 * MAX_SPOOLED_BYTES)
    body, content_type = encode({}, {"file": ("a.wav", content)})
    with read([body[start : start + 65_536] for start in range(0, len(body), 65_536)], content_type) as form:
        assert form.file.content._rolled  # type: ignore[attr-defined]
        assert form.file.content.read() == content


@pytest.mark.parametrize("body", [
    b"--b--\r\n", b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nhello\r\n--b--\r\n',
])  # fmt: skip
def test_a_form_without_a_file(body: bytes) -> None:
    error = refused([body], "multipart/form-data; boundary=b")
    assert (error.status, error.param, error.code) == (400, "file", "missing_required_parameter")


@pytest.mark.parametrize("body", [b"", b"--b\r\n", b"nonsense", b"--b\r\n\r\nx\r\n--b--\r\n",
    b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nendless',
    b'--b\r\nContent-Disposition: attachment; name="a"\r\n\r\nx\r\n--b--\r\n',
    b"--b\r\n" + b"X-A: 1\r\n" * 100 + b"\r\nx\r\n--b--\r\n",
    b"--b\r\nX: " + b"y" * 10_000 + b"\r\n\r\nx\r\n--b--\r\n",
])  # fmt: skip
def test_what_is_no_form(body: bytes) -> None:
    error = refused([body], "multipart/form-data; boundary=b")
    assert (error.status, error.param) == (400, None)


@pytest.mark.parametrize("content_type", ["", "application/json", "multipart/mixed; boundary=b"])
def test_another_content_type(content_type: str) -> None:
    assert refused([b""], content_type).status == 415


@pytest.mark.parametrize("content_type", ["multipart/form-data", f"multipart/form-data; boundary={'b' * 71}"])
def test_no_usable_boundary(content_type: str) -> None:
    assert refused([b""], content_type).status == 400


def test_sizes_are_counted_and_believed() -> None:
    body, content_type = encode({}, {"file": bytes(5000)})
    assert refused([body[:2000], body[2000:]], content_type, 3000).status == 413

    async def receive() -> dict[str, Any]:
        raise AssertionError("a byte was read")

    headers = [(b"content-type", content_type.encode()), (b"content-length", b"2147483648")]
    with pytest.raises(ApiError) as caught:
        asyncio.run(
            read_form(Request({"type": "http", "headers": headers, "state": {"held": HeldBytes()}}, receive), 3000)
        )
    assert caught.value.status == 413


def test_fields_and_parts_are_bounded() -> None:
    body, content_type = encode({"prompt": "x" * (MAX_FIELD_BYTES + 1)}, {"file": b"x"})
    assert refused([body], content_type).status == 413
    body, content_type = encode({"a": ["x"] * (MAX_PARTS + 1)}, {"file": b"x"})
    assert refused([body], content_type).status == 400


def test_files_in_other_places_are_refused_by_name() -> None:
    body, content_type = encode({}, {"image": ("a.png", b"x")})
    assert refused([body], content_type).param == "image"
    body = (b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx\r\n' * 2) + b"--b--\r\n"
    assert refused([body], "multipart/form-data; boundary=b").param == "file"


def test_text_must_be_text() -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n\xff\r\n--b--\r\n'
    error = refused([body], "multipart/form-data; boundary=b")
    assert (error.status, error.param) == (400, "purpose")
