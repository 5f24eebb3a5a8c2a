"""Two keys on one engine: what one has computed is the other's to compute again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.conftest import ROOT, ServerProcess, input_audio, start_server, text

CLIP = input_audio((ROOT / "tests" / "fixtures" / "speech" / "digits_four_two_seven.wav").read_bytes())
MESSAGES = [{"role": "user", "content": [CLIP, text("What does the person say? " * 4)]}]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    server = start_server("--api-key", "key-a", "key-b")
    yield server
    server.stop()


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
