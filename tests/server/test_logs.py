"""The line that a request leaves in the log: all that is known of it as JSON, nothing of what was said."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.log_lines import JsonFormatter

from .conftest import Servers, audio_part, text_part, user

ROOT = Path(__file__).parent.parent.parent


class Lines(logging.Handler):
    """Formatted lines of requests."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self.lines: list[dict[str, Any]] = []
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        assert "\n" not in line
        self.text += line
        self.lines.append(json.loads(line))

    def of(self, request_id: str) -> dict[str, Any]:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            for line in self.lines:
                if line.get("request_id") == request_id:
                    return line
            time.sleep(0.01)
        raise AssertionError(f"no line for {request_id}")


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler, access = Lines(), logging.getLogger("server.access")
    level = access.level
    access.addHandler(handler)
    access.setLevel(logging.DEBUG)
    yield handler
    access.removeHandler(handler)
    access.setLevel(level)


def test_a_request_with_audio(servers: Servers, lines: Lines) -> None:
    served = servers.start(api_key=("hidden-key", "other"))
    served.say("Secret answer", delay_s=0.01)
    headers = {"authorization": "Bearer hidden-key", "x-request-id": "mine"}
    body = {"messages": [user(audio_part(1.5), audio_part(0.5), text_part("secret question"))], "stream": True}
    answer = served.post(body, "/v1/chat/completions?token=hidden", headers=headers)
    assert answer.headers["x-request-id"] == "mine"
    line = lines.of("mine")
    stages = line.pop("stages_ms")
    assert stages.keys() == {"decode", "prompt", "grammar", "queue", "prefill", "generate", "detokenize"}
    assert all(value >= 0 for value in stages.values())
    assert line.pop("ts").endswith("Z")
    assert 10 <= line.pop("ttft_ms") < line.pop("e2e_ms")
    assert line.pop("queue_ms") < 1000
    request = served.engine.requests[0]
    assert line == {
        "level": "info",
        "process": "server",
        "logger": "server.access",
        "request_id": "mine",
        "key_id": "02c15a20",
        "method": "POST",
        "route": "/v1/chat/completions",
        "status": 200,
        "client_gone": False,
        "audio_count": 2,
        "audio_seconds": 2.0,
        "audio_formats": ["wav"],
        "audio_bytes": 2 * 44 + 2 * 2 * 16_000,
        "model": "tiny-audio",
        "stream": True,
        "prompt_tokens": len(request.prompt_token_ids),
        "completion_tokens": len(served.engine.script.token_ids),
        "cached_tokens": 16,
        "finish_reason": "stop",
    }
    assert "ecret" not in lines.text
    assert "hidden" not in lines.text


def test_refusals_and_clients_that_leave(servers: Servers, lines: Lines) -> None:
    served = servers.start()
    served.post({"messages": []}, headers={"x-request-id": "refused"})
    refused = lines.of("refused")
    assert (refused["status"], refused["client_gone"]) == (400, False)
    assert refused["error"]
    assert "prompt_tokens" not in refused
    served.say("one two three four five six seven", delay_s=0.3)
    with pytest.raises(httpx.ReadTimeout):
        served.post({"messages": [user("Hi")]}, headers={"x-request-id": "gone"}, timeout=0.4)
    gone = lines.of("gone")
    assert (gone["status"], gone["client_gone"], gone["finish_reason"]) == (499, True, "abort")
    served.client.get(f"{served.url}/health", headers={"x-request-id": "probe"})
    assert lines.of("probe")["level"] == "debug"


def test_other_lines() -> None:
    try:
        raise ValueError("broken\nhere")
    except ValueError:
        record = logging.LogRecord("a.b", logging.ERROR, __file__, 1, "it %s", ("failed",), sys.exc_info())
    record.created = 1_700_000_000.0004
    line = json.loads(JsonFormatter().format(record))
    assert line.pop("exception").endswith("ValueError: broken\nhere")
    named = {"level": "error", "process": "server", "logger": "a.b"}
    assert line == {"ts": "2023-11-14T22:13:20.000Z", **named, "message": "it failed"}


def test_what_nobody_catches_is_a_line_too() -> None:
    script = """
    import threading, warnings
    from engine.log_lines import log_all
    log_all("engine", as_json=True)
    warnings.warn("old")
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    raise ValueError("odd")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True)
    old, thread, odd = map(json.loads, done.stderr.splitlines())
    assert done.returncode == 1
    assert "old" in old["message"]
    assert "ZeroDivisionError" in thread["exception"]
    assert "ValueError: odd" in odd["exception"]
    assert {line["process"] for line in (old, thread, odd)} == {"engine"}
