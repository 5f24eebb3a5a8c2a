"""Audio over 30 s in chats and completions: split without loss, refused, or truncated and told."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
import soundfile

from server.prompt.tokenizer import Tokenizer

from .conftest import Served, Servers, audio_part, text_part, user
from .test_streaming import events

SECONDS = 65.0
COMPLETIONS = "/v1/completions"


def recording() -> np.ndarray:
    """Noise with a pause in every window's last seconds; as 16-bit WAV it comes through sample for sample."""
    samples = np.random.default_rng(1).integers(-9_000, 9_000, int(SECONDS * 16_000)).astype(np.int16)
    for second in (27, 55):
        samples[second * 16_000 : second * 16_000 + 8_000] = 0
    return samples


def long_part() -> dict[str, Any]:
    file = io.BytesIO()
    soundfile.write(file, recording(), 16_000, format="WAV", subtype="PCM_16")
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(file.getvalue()).decode()}}


LONG = long_part()


@pytest.fixture(scope="module")
def roomy(servers: Servers) -> Served:
    return servers.start(max_model_len=8192)


@pytest.fixture
def server(roomy: Served) -> Served:
    roomy.engine.requests.clear()
    roomy.say("Yes.")
    return roomy


def test_windows_are_consecutive_audios_of_the_turn(server: Served, tokenizer: Tokenizer) -> None:
    messages = [user(audio_part(0.5), LONG, text_part("Well?"))]
    answer = server.openai.chat.completions.create(model="tiny-audio", messages=messages)
    request = server.engine.requests[0]
    clips = request.clips[1:]
    assert np.array_equal(np.concatenate([clip.samples for clip in clips]), recording() / np.float32(32768))
    assert [len(clip.samples) <= 480_000 for clip in clips] == [True] * 3
    assert 27.0 < len(clips[0].samples) / 16_000 < 27.5
    assert "truncated_audio_seconds" not in answer.usage.model_dump()["prompt_tokens_details"]
    text = b"".join(map(tokenizer.bytes_of, request.prompt_token_ids)).decode()
    heads = [f"Audio {number}: <|audio_bos|>" for number in (1, 2, 3, 4)]
    assert [text.count(head) for head in heads] == [1] * 4
    assert "Audio 5" not in text


def test_windows_in_a_raw_prompt(server: Served, tokenizer: Tokenizer) -> None:
    body = {"prompt": "<|audio_bos|><|AUDIO|><|audio_eos|>Go:", "audio": [LONG]}
    assert server.post(body, COMPLETIONS).status_code == 200
    request = server.engine.requests[0]
    assert len(request.clips) == 3
    for clip in request.clips:
        assert request.prompt_token_ids[clip.offset - 1] == tokenizer.special["<|audio_bos|>"]
        assert request.prompt_token_ids[clip.offset + clip.num_tokens] == tokenizer.special["<|audio_eos|>"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "param"), [("/v1/chat/completions", "messages[0].content[0]"),
                                             (COMPLETIONS, "audio[0]")])  # fmt: skip
def test_truncation_is_told(server: Served, path: str, param: str, stream: bool) -> None:
    body = {"prompt": "<|AUDIO|>Go:", "audio": [LONG]} if path == COMPLETIONS else {"messages": [user(LONG)]}
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    response = server.post({**body, "long_audio": "truncate", **options}, path)
    assert response.headers["x-audio-truncated"] == f"{param}=65.00->30.00"
    usage = (events(response.text)[-1] if stream else response.json())["usage"]
    assert usage["prompt_tokens_details"]["truncated_audio_seconds"] == 35.0
    assert usage["prompt_tokens_details"]["audio_tokens"] == 750
    (clip,) = server.engine.requests[0].clips
    assert np.array_equal(clip.samples, recording()[:480_000] / np.float32(32768))


def test_a_short_clip_is_never_truncated(server: Served) -> None:
    response = server.post({"messages": [user(audio_part(29.9))], "long_audio": "truncate"})
    assert "x-audio-truncated" not in response.headers
    assert "truncated_audio_seconds" not in response.json()["usage"]["prompt_tokens_details"]


def test_error_mode_names_both_lengths(server: Served) -> None:
    error = server.post({"messages": [user(LONG)], "long_audio": "error"}).json()["error"]
    assert (error["param"], error["code"]) == ("messages[0].content[0]", "audio_too_long")
    assert "65.00 s" in error["message"]
    assert "30 s" in error["message"]


def test_the_server_sets_the_default(servers: Servers) -> None:
    strict = servers.start(max_model_len=8192, long_audio="error")
    strict.say("Yes.")
    assert strict.post({"messages": [user(LONG)]}).json()["error"]["code"] == "audio_too_long"
    assert strict.post({"messages": [user(LONG)], "long_audio": "split"}).status_code == 200


def test_what_does_not_fit_the_context_is_told_with_its_ways_out(served: Served) -> None:
    error = served.post({"messages": [user({**LONG})], "long_audio": "split"}).json()["error"]
    assert error["code"] == "request_too_large"  # this server takes bodies of 1 MiB
    small = {"messages": [user(audio_part(31, rate=8_000))]}
    error = served.post(small).json()["error"]
    assert (error["param"], error["code"]) == ("messages[0].content[0]", "context_length_exceeded")
    for word in ("775 tokens", "256 tokens", "31 s", "transcriptions", "truncate"):
        assert word in error["message"]
    assert not served.engine.requests


def test_longer_than_is_decoded_is_refused_in_any_mode(servers: Servers) -> None:
    short = servers.start(max_model_len=8192, max_audio_seconds=60)
    for mode in ("split", "error", "truncate"):
        error = short.post({"messages": [user(LONG)], "long_audio": mode}).json()["error"]
        assert (error["param"], error["code"]) == ("messages[0].content[0]", "audio_too_long")


def test_an_upload_is_split_like_any_other_recording(server: Served) -> None:
    content = base64.b64decode(LONG["input_audio"]["data"])
    file = server.openai.files.create(file=("long.wav", content), purpose="user_data")
    uploaded = {"type": "input_audio", "input_audio": {"id": file.id}}
    for part in (uploaded, LONG):
        assert server.post({"messages": [user(part, text_part("Well?"))]}).status_code == 200
    by_id, inline = server.engine.requests
    assert [clip.content_hash for clip in by_id.clips] == [clip.content_hash for clip in inline.clips]
    assert len(by_id.clips) == 3
    assert by_id.prompt_token_ids == inline.prompt_token_ids
    truncated = server.post({"messages": [user(uploaded)], "long_audio": "truncate"})
    assert truncated.headers["x-audio-truncated"] == "messages[0].content[0]=65.00->30.00"
    server.openai.files.delete(file.id)


@pytest.mark.parametrize(("path", "body"), [
    ("/v1/chat/completions", {"messages": [user(audio_part(0.5), LONG)]}),
    (COMPLETIONS, {"prompt": "<|AUDIO|><|audio_bos|><|AUDIO|><|audio_eos|>Go:", "audio": [audio_part(0.5), LONG]}),
])  # fmt: skip
def test_windows_are_counted_before_anything_runs(server: Served, path: str, body: dict[str, Any]) -> None:
    counted = server.post(body, "/tokenize").json()
    assert not server.engine.requests
    assert server.post(body, path).status_code == 200
    (request,) = server.engine.requests
    assert counted["tokens"] == list(request.prompt_token_ids)
    assert counted["audio_tokens_per_clip"] == [clip.num_tokens for clip in request.clips]
    assert len(request.clips) == 4
    truncated = server.post({**body, "long_audio": "truncate"}, "/tokenize")
    assert truncated.json()["audio_tokens_per_clip"] == [12, 750]
    assert "=65.00->30.00" in truncated.headers["x-audio-truncated"]
    assert server.post({**body, "long_audio": "error"}, "/tokenize").json()["error"]["code"] == "audio_too_long"
