"""Uploads: OpenAI's client sends a recording once and asks about it by id; nobody else can."""

from __future__ import annotations

import base64
import time
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from .conftest import Served, Servers, audio_part, text_part, user, wav_base64


def wav(seconds: float = 0.5, **options: Any) -> bytes:
    return base64.b64decode(wav_base64(seconds, **options))


def by_id(audio_id: Any, **fields: Any) -> dict[str, Any]:
    part = {"type": "input_audio", "input_audio": {"id": audio_id}}
    return {"messages": [user(part, text_part("Well?"))], **fields}


def upload(served: Served, content: bytes, data: dict[str, str] | None = None, key: str = "key") -> httpx.Response:
    return served.client.post(
        f"{served.url}/v1/files",
        data={"purpose": "user_data"} if data is None else data,
        files={"file": ("clip.wav", content, "audio/wav")},
        headers={"Authorization": f"Bearer {key}"},
    )


@pytest.fixture(scope="module")
def two_keys(servers: Servers) -> Served:
    server = servers.start(api_key=("first", "second"), max_stored_audio_mb=0.2, stored_audio_ttl=1000)
    server.say("Yes.")
    return server


def test_send_once_ask_often(served: Served) -> None:
    client = served.openai
    file = client.files.create(file=("clip.wav", wav()), purpose="user_data")
    assert (file.object, file.filename, file.bytes, file.purpose) == ("file", "clip.wav", len(wav()), "user_data")
    assert file.expires_at is not None
    assert file.expires_at - file.created_at == 3600
    for question in ("What?", "Who?"):
        assert served.post(by_id(file.id, messages=[
            user({"type": "input_audio", "input_audio": {"id": file.id}}, text_part(question))
        ])).status_code == 200  # fmt: skip
    assert served.post({"messages": [user(audio_part(), text_part("What?"))]}).status_code == 200
    first, second, inline = (request.clips[0] for request in served.engine.requests)
    assert first.content_hash == second.content_hash == inline.content_hash
    np.testing.assert_array_equal(first.samples, inline.samples)
    assert served.engine.requests[0].prompt_token_ids == served.engine.requests[2].prompt_token_ids
    client.files.delete(file.id)


def test_completions_take_ids_too(served: Served) -> None:
    file = served.openai.files.create(file=("clip.wav", wav()), purpose="user_data")
    body = {"prompt": "<|AUDIO|>", "audio": [{"type": "input_audio", "input_audio": {"id": file.id}}]}
    assert served.post(body, "/v1/completions").status_code == 200
    assert len(served.engine.requests[0].clips) == 1
    served.openai.files.delete(file.id)


def test_list_retrieve_delete(served: Served) -> None:
    client = served.openai
    ids = [client.files.create(file=wav(seconds), purpose="user_data").id for seconds in (0.1, 0.2, 0.3)]
    assert [file.id for file in client.files.list()] == ids[::-1]
    assert [file.id for file in client.files.list(order="asc", limit=2)] == ids
    assert client.files.list(order="asc", limit=2).has_more
    assert [file.id for file in client.files.list(order="asc", after=ids[0])] == ids[1:]
    assert not client.files.list(purpose="batch").data
    assert client.files.retrieve(ids[0]).bytes == len(wav(0.1))
    with pytest.raises(openai.BadRequestError, match="cannot be downloaded"):
        client.files.content(ids[0])
    for audio_id in ids:
        assert client.files.delete(audio_id).deleted
    assert not client.files.list().data
    for call in (client.files.retrieve, client.files.delete, client.files.content):
        with pytest.raises(openai.NotFoundError) as caught:
            call(ids[0])
        assert (caught.value.param, caught.value.code) == ("file_id", "file_not_found")
    response = served.post(by_id(ids[0]))
    assert response.status_code == 404
    error = response.json()["error"]
    assert error["param"] == "messages[0].content[0].input_audio.id"
    assert error["code"] == "audio_not_found"


def test_keys_do_not_share(two_keys: Served) -> None:
    first = upload(two_keys, wav(), key="first").json()["id"]
    second = upload(two_keys, wav(), key="second").json()["id"]
    assert first != second
    for key, audio_id, status in (("first", first, 200), ("second", second, 200), ("second", first, 404),
                                  ("first", second, 404)):  # fmt: skip
        headers = {"Authorization": f"Bearer {key}"}
        assert two_keys.post(by_id(audio_id), headers=headers).status_code == status
        assert two_keys.client.get(f"{two_keys.url}/v1/files/{audio_id}", headers=headers).status_code == status
        listed = two_keys.client.get(f"{two_keys.url}/v1/files", headers=headers).json()["data"]
        assert [file["id"] for file in listed] == [first if key == "first" else second]
    assert upload(two_keys, wav(), key="third").status_code == 401


def test_a_full_share_says_so_and_hurts_nobody_else(servers: Servers) -> None:
    served = servers.start(api_key=("first", "second"), max_stored_audio_mb=0.2, stored_audio_ttl=1000)
    kept = upload(served, wav(0.6), key="first").json()["id"]
    full = upload(served, wav(1.0), key="first")
    assert full.status_code == 429
    assert full.json()["error"]["code"] == "audio_store_full"
    assert 990 < int(full.headers["retry-after"]) <= 1000
    assert upload(served, wav(1.0), key="second").status_code == 200
    headers = {"Authorization": "Bearer first"}
    assert served.client.delete(f"{served.url}/v1/files/{kept}", headers=headers).status_code == 200
    assert upload(served, wav(1.0), key="first").status_code == 200
    huge = upload(served, wav(10), key="first")
    assert (huge.status_code, huge.json()["error"]["code"]) == (413, "audio_too_large")


def test_expiry(served: Served) -> None:
    file = served.openai.files.create(
        file=wav(), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 1}
    )
    assert served.post(by_id(file.id)).status_code == 200
    time.sleep(1.1)
    assert served.post(by_id(file.id)).status_code == 404


GOOD = {"purpose": "user_data"}
BAD: dict[str, tuple[bytes, dict[str, str], str, str | None]] = {
    "no purpose": (wav(), {}, "purpose", "missing_required_parameter"),
    "another purpose": (wav(), {"purpose": "fine-tune"}, "purpose", "invalid_value"),
    "not audio": (b"hello" * 100, GOOD, "file", "unsupported_audio"),
    "empty": (b"", GOOD, "file", "audio_empty"),
    "20 ms": (wav(samples=320), GOOD, "file", "audio_too_short"),
    "for ever": (wav(), GOOD | {"expires_after[seconds]": "3601"}, "expires_after[seconds]",
                 "integer_above_max_value"),
    "no time": (wav(), GOOD | {"expires_after[seconds]": "0"}, "expires_after[seconds]", "integer_below_min_value"),
    "no number": (wav(), GOOD | {"expires_after[seconds]": "soon"}, "expires_after[seconds]", None),
    "from when": (wav(), GOOD | {"expires_after[anchor]": "last_active_at"}, "expires_after[anchor]",
                  "invalid_value"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_uploads(served: Served, name: str) -> None:
    content, data, param, code = BAD[name]
    response = upload(served, content, data)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["param"] == param
    assert code is None or error["code"] == code


def test_no_file_and_no_form(served: Served) -> None:
    response = served.client.post(f"{served.url}/v1/files", files={"purpose": (None, "user_data")})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "file")
    response = served.post({"purpose": "user_data"}, "/v1/files")
    assert response.status_code == 415


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=10001", "order=up", "after=file-x"])
def test_bad_queries(served: Served, query: str) -> None:
    response = served.client.get(f"{served.url}/v1/files?{query}")
    assert response.status_code == (404 if query.startswith("after") else 400)
    assert response.json()["error"]["param"] == query.split("=")[0]


@pytest.mark.parametrize(("audio", "param", "code"), [
    ({"id": "file-1", "data": "AAAA"}, "messages[0].content[0].input_audio.id", "invalid_value"),
    ({"id": 3}, "messages[0].content[0].input_audio.id", "invalid_type"),
])  # fmt: skip
def test_bad_references(served: Served, audio: dict[str, Any], param: str, code: str) -> None:
    response = served.post({"messages": [user({"type": "input_audio", "input_audio": audio})]})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)
