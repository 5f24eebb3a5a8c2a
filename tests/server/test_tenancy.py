"""What one key has sent is never found by another: salts, hashes of clips, grammars."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.encoder_cache import EncoderCache
from engine.messages import EngineRequest
from server.access.auth import EVERYBODY, ApiKeys, cache_salt

from .conftest import Served, Servers, audio_part, text_part, user, wav_base64

CHAT = {"messages": [user(audio_part(), text_part("Hi"))], "cache_salt": "x"}
RESPONSES = {"input": [user(audio_part(), {"type": "input_text", "text": "Hi"})], "cache_salt": "x"}
COMPLETIONS = {
    "prompt": "<|audio_bos|><|AUDIO|><|audio_eos|>Hi",
    "audio": [audio_part()],
    "cache_salt": "x",
}


@pytest.fixture(scope="module")
def keyed(servers: Servers) -> Served:
    served = servers.start(api_key=("a", "b"))
    served.say("Hi")
    return served


def sent(served: Served, path: str, body: dict[str, Any], key: str) -> EngineRequest:
    """What the engine gets of a request."""
    headers = {"Authorization": f"Bearer {key}"}
    if path.startswith("/v1/audio"):
        file = ("clip.wav", base64.b64decode(wav_base64()))
        response = served.client.post(served.url + path, files={"file": file}, data=body, headers=headers)
    else:
        response = served.post(body, path, headers=headers)
    assert response.status_code == 200, response.text
    return served.engine.requests[-1]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", {"messages": CHAT["messages"]}),
        ("/v1/responses", RESPONSES),
        ("/v1/completions", COMPLETIONS),
        ("/v1/audio/transcriptions", {"model": "tiny-audio"}),
        ("/v1/audio/translations", {"model": "tiny-audio"}),
    ],
)
def test_keys_share_nothing(keyed: Served, path: str, body: dict[str, Any]) -> None:
    of_a, again, of_b = (sent(keyed, path, body, key) for key in "aab")
    assert of_a.prompt_token_ids == of_b.prompt_token_ids
    assert of_a.cache_salt == again.cache_salt
    assert of_a.cache_salt != of_b.cache_salt
    cache = EncoderCache(1 << 20, 4)
    cache.add(of_a.clips[0])
    assert cache.has(again.clips[0])
    assert not cache.has(of_b.clips[0])
    for request in (of_a, of_b):
        assert request.cache_salt
        assert "a" != request.cache_salt != "x", "no key and no salt of a request stands in it"


def test_without_keys_all_share_unless_they_ask(served: Served) -> None:
    plain = sent(served, "/v1/chat/completions", {"messages": CHAT["messages"]}, "a")
    other = sent(served, "/v1/audio/transcriptions", {"model": "tiny-audio"}, "b")
    salted = sent(served, "/v1/chat/completions", CHAT, "a")
    assert (plain.cache_salt, other.cache_salt, salted.cache_salt) == (None, None, "x")
    assert plain.clips[0].content_hash == other.clips[0].content_hash != salted.clips[0].content_hash


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.none() | st.text(min_size=1)), min_size=2, max_size=8, unique=True)
)
def test_salts_are_as_different_as_keys_and_salts(pairs: list[tuple[str, str | None]]) -> None:
    keys = ApiKeys("abc")
    callers = {key: keys.check([f"Bearer {key}"]) for key in "abc"}
    salts = [cache_salt(callers[key], own) for key, own in pairs]
    assert len(set(salts)) == len(pairs)
    assert all(cache_salt(EVERYBODY, own) == own for _, own in pairs)


def test_grammars_are_compiled_for_each_key(keyed: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[bytes] = []

    def ask(_: object, line: bytes) -> dict[str, str]:
        compiled.append(line)
        return {"grammar": "{}"}

    monkeypatch.setattr("server.structured.compiler._Worker.ask", ask)
    body = {"messages": [user("Hi")], "structured_outputs": {"regex": "only here"}}
    for key, count in (("a", 1), ("a", 1), ("b", 2), ("b", 2), ("a", 2)):
        sent(keyed, "/v1/chat/completions", body, key)
        assert len(compiled) == count
