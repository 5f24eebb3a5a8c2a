"""Where audio may come from, over HTTP: the server's own files, and links whose answers are kept for one key."""

from __future__ import annotations

import base64
import gc
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import httpx
import pytest

from configs.command_line import SettingsError, load_settings
from server.errors import ApiError

from .conftest import Served, Servers, text_part, user, wav_base64


class Origin(BaseHTTPRequestHandler):
    """Has one clip, which may be used for a minute, and writes down who asked."""

    requests: ClassVar[list[dict[str, str]]] = []

    def do_GET(self) -> None:
        type(self).requests.append({name.lower(): value for name, value in self.headers.items()})
        body = base64.b64decode(wav_base64())
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "max-age=60")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def origin() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Origin)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Origin.requests.clear()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(served: Served, url: str, key: str = "key") -> httpx.Response:
    part = {"type": "audio_url", "audio_url": {"url": url}}
    headers = {"Authorization": f"Bearer {key}", "Cookie": "session=mine"}
    return served.post({"messages": [user(part, text_part("Well?"))]}, headers=headers)


def test_answers_are_kept_for_the_key_that_fetched_them(servers: Servers, origin: str) -> None:
    served = servers.start(api_key=("first", "second"), allowed_private_media_hosts=(origin,))
    served.say("Yes.")
    for key in ("first", "second", "first", "second"):
        assert ask(served, f"http://{origin}/a.wav", key).status_code == 200
    assert len(Origin.requests) == 2
    assert not {"authorization", "cookie"} & {name for request in Origin.requests for name in request}
    assert ask(served, f"http://localhost:{origin.split(':')[1]}/a.wav", "first").status_code == 400
    assert len(Origin.requests) == 2


def test_the_cache_can_be_off(servers: Servers, origin: str) -> None:
    served = servers.start(allowed_private_media_hosts=(origin,), media_cache_mb=0)
    served.say("Yes.")
    for _ in range(2):
        assert ask(served, f"http://{origin}/a.wav").status_code == 200
    assert len(Origin.requests) == 2


def test_local_files_are_read_from_one_folder(servers: Servers, tmp_path: Path) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    for path in (folder / "a.wav", tmp_path / "secret.wav"):
        path.write_bytes(base64.b64decode(wav_base64()))
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to(tmp_path / "secret.wav")
    served = servers.start(allowed_local_media_path=folder)
    served.say("Yes.")
    assert ask(served, f"file://{folder}/a.wav").status_code == 200
    messages = set()
    for name in ("../secret.wav", "link", "pipe", "missing", "", "%2e%2e/secret.wav"):
        answer = ask(served, f"file://{folder}/{name}")
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "media_url_refused")
        assert error["param"] == "messages[0].content[0]"
        messages.add(error["message"])
    assert len(messages) == 1
    assert str(tmp_path) not in messages.pop()


def test_local_files_are_off_by_default(served: Served, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(base64.b64decode(wav_base64()))
    error = ask(served, f"file://{tmp_path}/a.wav").json()["error"]
    assert error["code"] == "media_url_refused"
    assert "file:" in error["message"]


def test_the_folder_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="allowed-local-media-path"):
        load_settings(["--allowed-local-media-path", str(tmp_path / "missing")], {})


def test_a_refusal_is_forgotten_at_once(served: Served) -> None:
    """A failure and the frames that it went through hold each other, and the request's megabytes with them."""
    part = {"type": "input_audio", "input_audio": {"data": "A" * 500_000 + "*", "format": "wav"}}
    gc.collect()
    gc.disable()
    try:
        assert served.post({"messages": [user(part, text_part("Well?"))]}).status_code == 400
        deadline = time.monotonic() + 5
        while any(type(kept) is ApiError for kept in gc.get_objects()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        gc.enable()
