"""Two keys on one engine: what one has computed is the other's to compute again."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.integration.conftest import ROOT, ServerProcess, input_audio, start_server, text, wav
from tests.reference import noise

CLIP = input_audio((ROOT / "tests" / "fixtures" / "speech" / "digits_four_two_seven.wav").read_bytes())
LINKED = wav(noise(16_000))
MESSAGES = [{"role": "user", "content": [CLIP, text("What does the person say? " * 4)]}]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    server = start_server("--api-key", "key-a", "key-b", "--allowed-private-media-hosts", "127.0.0.1")
    yield server
    server.stop()


@pytest.fixture
def origin() -> Iterator[tuple[str, list[str]]]:
    """A clip elsewhere that may be kept for an hour: its URL, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "audio/wav")
            self.send_header("Content-Length", str(len(LINKED)))
            self.send_header("Cache-Control", "max-age=3600")
            self.end_headers()
            self.wfile.write(LINKED)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/clip.wav", asked
        http.shutdown()


def cached_tokens(server: ServerProcess, key: str, **more: Any) -> int:
    answer = server.openai.with_options(api_key=key).chat.completions.create(
        model="tympan-tiny", messages=MESSAGES, temperature=0, max_tokens=4, extra_body=more
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    return answer.usage.prompt_tokens_details.cached_tokens or 0


def test_a_key_finds_only_what_it_has_sent(server: ServerProcess) -> None:
    assert cached_tokens(server, "key-a") == 0
    assert cached_tokens(server, "key-b") == 0, "computed for the other key"
    assert cached_tokens(server, "key-a") > 50
    assert cached_tokens(server, "key-b") > 50
    assert cached_tokens(server, "key-a", cache_salt="s") == 0
    assert cached_tokens(server, "key-b", cache_salt="s") == 0
    assert cached_tokens(server, "key-a", cache_salt="s") > 50


def encoder_cache(server: ServerProcess) -> tuple[int, int]:
    """-> clips looked up, and found, since the start."""
    metrics = server.http.get("/metrics", headers={"Authorization": "Bearer key-a"}).text
    names = ("queries", "hits")
    found = [re.search(rf"^vllm:mm_cache_{name}_total{{.*}} ([0-9.]+)", metrics, re.MULTILINE) for name in names]
    queries, hits = (int(float(match[1])) for match in found if match)
    return queries, hits


def test_a_clip_is_encoded_and_fetched_for_each_key(server: ServerProcess, origin: tuple[str, list[str]]) -> None:
    """Nothing that a caller can count or time tells that another key has sent, or linked to, the same clip."""
    url, asked = origin
    for number, (key, is_first) in enumerate((("key-a", True), ("key-b", True), ("key-a", False), ("key-b", False))):
        queries, hits = encoder_cache(server)
        parts = [{"type": "audio_url", "audio_url": {"url": url}}, text("What is said?")]
        messages = [{"role": "system", "content": f"Question {number}."}, {"role": "user", "content": parts}]
        answer = server.http.post(
            "/v1/chat/completions",
            json={"messages": messages, "max_tokens": 2},
            headers={"Authorization": f"Bearer {key}"},
        )
        assert answer.status_code == 200
        assert encoder_cache(server) == (queries + 1, hits + (not is_first))
        assert len(asked) == min(number + 1, 2), "the first link of each key is fetched, no other"
