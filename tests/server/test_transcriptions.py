"""POST /v1/audio/transcriptions and /translations over a real socket, asked by the real OpenAI clients."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import soundfile

from engine.errors import RequestError
from engine.messages import EngineRequest
from server.requests.parameters import REFUSED_IN_TRANSCRIPTIONS
from server.transcription.form import TranscriptionForm
from server.transcription.transcriber import MAX_WINDOWS_IN_FLIGHT

from .conftest import Served, Servers
from .fake_engine import Script
from .test_streaming import events

PATH = "/v1/audio/transcriptions"
TRANSLATIONS = "/v1/audio/translations"
WINDOW = 2 * 16_000


def wav(*loudness: float, seconds: float = 2.0) -> bytes:
    """One stretch of noise for each loudness; the last 100 ms of each are silent, so that cuts fall there."""
    stretches = []
    for index, level in enumerate(loudness):
        stretch = np.random.default_rng(index).uniform(-level, level, int(seconds * 16_000))
        stretch[-1_600:] = 0
        stretches.append(stretch)
    file = io.BytesIO()
    soundfile.write(file, np.concatenate(stretches), 16_000, format="WAV", subtype="PCM_16")
    return file.getvalue()


ONE = wav(0.5, seconds=1.0)
THREE = wav(0.2, 0.5, 0.9, seconds=1.9)


@pytest.fixture(scope="module")
def two_second_server(servers: Servers) -> Served:
    return servers.start(transcription_window_seconds=2, max_upload_mb=8, sse_keep_alive_interval=0.2)


@pytest.fixture
def server(two_second_server: Served) -> Iterator[Served]:
    engine = two_second_server.engine
    engine.requests.clear()
    engine.aborted.clear()
    engine.max_running = 0
    two_second_server.say("hello there ")
    yield two_second_server
    engine.script_of = None


def post(server: Served, data: bytes | None = ONE, path: str = PATH, **fields: Any) -> httpx.Response:
    files = {} if data is None else {"file": ("speech.wav", data, "audio/x-wav")}
    return server.client.post(server.url + path, data={"model": "tiny-audio", **fields}, files=files)


def by_loudness(server: Served, **script: Any) -> None:
    """Each window is answered with a word of its own: quiet, medium or loud."""

    def script_of(request: EngineRequest) -> Script:
        peak = np.abs(request.clips[0].samples).max()
        word = "quiet" if peak < 0.3 else "medium" if peak < 0.7 else "loud"
        ids = [*server.tokenizer.encode(f" {word} one.\n"), server.tokenizer.special["<|im_end|>"]]
        delay = {"quiet": 0.05, "medium": 0.01, "loud": 0.0}[word]  # the first is the last to end
        return Script(ids, delay_s=delay, **script)

    server.engine.script_of = script_of


def test_json_with_the_openai_client(server: Served) -> None:
    answer = server.openai.audio.transcriptions.create(model="tiny-audio", file=("a.wav", ONE))
    assert answer.text == "hello there"
    request = server.engine.requests[0]
    assert answer.usage.type == "tokens"
    assert answer.usage.input_tokens == len(request.prompt_token_ids)
    assert answer.usage.output_tokens == len(server.engine.script.token_ids)
    assert answer.usage.input_token_details.audio_tokens == 25
    prompt = b"".join(map(server.tokenizer.bytes_of, request.prompt_token_ids)).decode()
    assert "<|audio_eos|>\nTranscribe the audio.<|im_end|>" in prompt


def test_async_client_with_everything_it_sends(server: Served) -> None:
    async def scenario() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as client:
            return await client.audio.transcriptions.create(
                model="tiny-audio",
                file=("a.wav", io.BytesIO(ONE)),
                response_format="verbose_json",
                timestamp_granularities=["segment"],
                language="en",
                prompt="Names: <|im_end|> Ada",
                temperature=0.5,
                chunking_strategy="auto",
                extra_body={"seed": 7, "max_completion_tokens": 30, "no_such_field": "x"},
            )

    answer = asyncio.run(scenario())
    assert (answer.task, answer.language, answer.duration, answer.text) == (
        "transcribe",
        "english",
        1.0,
        "hello there",
    )
    assert answer.usage.seconds == 1
    request = server.engine.requests[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.seed, sampling.max_tokens) == (0.5, 7, 30)
    prompt = b"".join(map(server.tokenizer.bytes_of, request.prompt_token_ids)).decode()
    assert "It is in English. These words may help to understand it: Names: <|im_end|> Ada" in prompt
    assert request.prompt_token_ids.count(server.tokenizer.special["<|im_end|>"]) == 2  # system's and user's


def test_default_sampling_is_greedy_whatever_the_checkpoint_says(server: Served) -> None:
    assert post(server).status_code == 200
    sampling = server.engine.requests[0].sampling
    assert (sampling.temperature, sampling.repetition_penalty, sampling.top_p) == (0.0, 1.0, 1.0)
    assert sampling.stop_token_ids
    assert sampling.logprobs is None


def test_windows_come_out_in_order_with_their_true_times(server: Served) -> None:
    by_loudness(server)
    body = post(server, THREE, response_format="verbose_json").json()
    assert body["text"] == "quiet one. medium one. loud one."
    assert [segment["text"] for segment in body["segments"]] == ["quiet one.", "medium one.", "loud one."]
    edges = [0.0]
    for request in sorted(server.engine.requests, key=lambda one: np.abs(one.clips[0].samples).max()):
        edges.append(edges[-1] + len(request.clips[0].samples) / 16_000)
    assert [segment["start"] for segment in body["segments"]] == pytest.approx(edges[:-1], abs=0.001)
    assert [segment["end"] for segment in body["segments"]] == pytest.approx(edges[1:], abs=0.001)
    assert body["duration"] == pytest.approx(5.7) == edges[-1]
    assert body["segments"][1]["tokens"]
    assert body["segments"][1]["avg_logprob"] == -0.5


def test_srt_vtt_and_text(server: Served) -> None:
    by_loudness(server)
    create = server.openai.audio.transcriptions.create
    texts = [
        create(model="tiny-audio", file=("a.wav", THREE), response_format=name) for name in ("srt", "vtt", "text")
    ]
    cuts = [len(request.clips[0].samples) for request in server.engine.requests[:2]]
    first, second = (f"00:00:0{at // 16_000},{at % 16_000 // 16:03}" for at in (cuts[0], sum(cuts)))
    assert texts[0] == (
        f"1\n00:00:00,000 --> {first}\nquiet one.\n\n"
        f"2\n{first} --> {second}\nmedium one.\n\n"
        f"3\n{second} --> 00:00:05,700\nloud one.\n\n"
    )
    cues = texts[0].replace(",", ".").split("\n\n")[:-1]
    assert texts[1] == "WEBVTT\n\n" + "".join(cue.split("\n", 1)[1] + "\n\n" for cue in cues)
    assert texts[2] == "quiet one. medium one. loud one.\n"
    assert post(server, response_format="text").headers["content-type"] == "text/plain; charset=utf-8"


def test_stream(server: Served) -> None:
    by_loudness(server)
    stream = server.openai.audio.transcriptions.create(model="tiny-audio", file=("a.wav", THREE), stream=True)
    *deltas, done = list(stream)
    assert {event.type for event in deltas} == {"transcript.text.delta"}
    assert "".join(event.delta for event in deltas) == "quiet one. medium one. loud one."
    assert (done.type, done.text) == ("transcript.text.done", "quiet one. medium one. loud one.")
    assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens
    assert done.usage.input_token_details.audio_tokens == sum(
        request.clips[0].num_tokens for request in server.engine.requests
    )


def test_text_begins_before_the_file_is_decoded_and_windows_in_flight_are_bounded(server: Served) -> None:
    server.say("word", delay_s=0.02)
    num_windows = 3 * MAX_WINDOWS_IN_FLIGHT
    with server.client.stream(
        "POST", server.url + PATH, data={"stream": "true"}, files={"file": ("a.wav", wav(*[0.5] * num_windows))}
    ) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: {"))
        assert json.loads(next(lines)[6:])["delta"]
        begun = len(server.engine.requests)
        rest = [json.loads(line[6:]) for line in lines]
    assert begun <= 2 * MAX_WINDOWS_IN_FLIGHT < len(server.engine.requests)
    assert rest[-1]["text"].split(" ") == ["word"] * len(server.engine.requests)
    assert 2 <= server.engine.max_running <= MAX_WINDOWS_IN_FLIGHT


def test_digital_silence_is_not_sent_to_the_model(server: Served) -> None:
    by_loudness(server)
    body = post(server, wav(0.2, 0.0, 0.0, 0.9), response_format="verbose_json").json()
    assert body["text"] == "quiet one. loud one."
    assert body["duration"] == 8.0
    assert all(np.abs(request.clips[0].samples).max() > 0 for request in server.engine.requests)
    server.engine.requests.clear()
    assert post(server, wav(0.0)).json()["text"] == ""
    (only,) = events(post(server, wav(0.0), stream="true").text)
    assert (only["type"], only["text"], only["usage"]["total_tokens"]) == ("transcript.text.done", "", 0)
    assert not server.engine.requests


def test_a_window_that_fails_fails_the_request(server: Served) -> None:
    def script_of(request: EngineRequest) -> Script:
        fails = np.abs(request.clips[0].samples).max() > 0.7
        return Script(server.tokenizer.encode("fine"), failure=RequestError("NaN logits") if fails else None)

    server.engine.script_of = script_of
    response = post(server, THREE)
    assert (response.status_code, response.json()["error"]["message"]) == (500, "NaN logits")
    with pytest.raises(openai.APIError, match="NaN logits"):
        list(server.openai.audio.transcriptions.create(model="tiny-audio", file=("a.wav", THREE), stream=True))


def test_translations(server: Served) -> None:
    answer = server.openai.audio.translations.create(model="tiny-audio", file=("a.wav", ONE))
    assert answer.text == "hello there"
    assert post(server, path=TRANSLATIONS).json() == {"text": "hello there"}
    verbose = post(server, path=TRANSLATIONS, language="de", response_format="verbose_json").json()
    assert (verbose["task"], verbose["language"]) == ("translate", "english")
    prompt = b"".join(map(server.tokenizer.bytes_of, server.engine.requests[-1].prompt_token_ids)).decode()
    assert "Translate the audio from German into English" in prompt


def test_the_base_recipe(servers: Servers) -> None:
    server = servers.start(transcription_recipe="base")
    server.say("<|zh|>你好")
    body = post(server, response_format="verbose_json").json()
    assert (body["text"], body["language"]) == ("你好", "chinese")
    assert post(server, language="fr").status_code == 200
    texts = [b"".join(map(server.tokenizer.bytes_of, request.prompt_token_ids)).decode() for request in
             server.engine.requests]  # fmt: skip
    wording = "<|audio_eos|>Detect the language and recognize the speech:"
    assert texts[0].endswith(wording)
    assert texts[1].endswith(f"{wording} <|fr|>")
    error = post(server, prompt="Ada").json()["error"]
    assert (error["param"], error["code"]) == ("prompt", "unsupported_parameter")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown language": ({"language": "xx"}, "language"),
    "a language's name": ({"language": "english"}, "language"),
    "hot": ({"temperature": "1.1"}, "temperature"),
    "no number": ({"temperature": "warm"}, "temperature"),
    "NaN": ({"temperature": "nan"}, "temperature"),
    "format": ({"response_format": "docx"}, "response_format"),
    "speakers": ({"response_format": "diarized_json"}, "response_format"),
    "streamed cues": ({"response_format": "srt", "stream": "true"}, "response_format"),
    "streamed segments": ({"response_format": "verbose_json", "stream": "true"}, "response_format"),
    "no boolean": ({"stream": "perhaps"}, "stream"),
    "words": (
        {"timestamp_granularities[]": ["segment", "word"], "response_format": "verbose_json"},
        "timestamp_granularities[]",
    ),
    "granularity without verbose": ({"timestamp_granularities[]": "segment"}, "timestamp_granularities[]"),
    "without brackets": ({"known_speaker_names": "Ada"}, "known_speaker_names[]"),
    "own chunking": ({"chunking_strategy": '{"type": "server_vad"}'}, "chunking_strategy"),
    "zero tokens": ({"max_completion_tokens": "0"}, "max_completion_tokens"),
    "seed": ({"seed": "1.5"}, "seed"),
    "prompt": ({"prompt": "x" * 9_000}, "prompt"),
    "prompt beyond the context": ({"prompt": "word " * 400}, "prompt"),
    **{name: ({name: "thing"}, name) for name in REFUSED_IN_TRANSCRIPTIONS},
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(server: Served, name: str) -> None:
    fields, param = REFUSED[name]
    response = post(server, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert len(response.content) < 1_000
    assert not server.engine.requests


def test_a_window_beyond_the_context_is_nobodys_prompt(served: Served) -> None:
    error = post(served, wav(0.5, seconds=15.0)).json()["error"]
    assert (error["param"], error["code"]) == ("file", "context_length_exceeded")
    error = post(served, wav(0.5, seconds=15.0), prompt="Ada").json()["error"]
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")


def test_a_stream_of_translation_is_refused(server: Served) -> None:
    assert post(server, path=TRANSLATIONS, stream="true").json()["error"]["param"] == "stream"


def test_empty_fields_and_harmless_values_pass(server: Served) -> None:
    fields = {*TranscriptionForm.model_fields, *REFUSED_IN_TRANSCRIPTIONS}
    assert post(server, **dict.fromkeys(fields, "")).status_code == 200
    for name, refusal in REFUSED_IN_TRANSCRIPTIONS.items():
        for value in refusal.harmless:
            assert post(server, **{name: value}).status_code == 200, name


def test_unknown_model(server: Served) -> None:
    assert post(server, model="whisper-1").status_code == 404


@pytest.mark.parametrize(("data", "code"), [
    (b"", "audio_empty"), (b"<html>", "unsupported_audio"), (ONE[:44], "audio_empty"),
    (ONE[: 44 + 2 * 320], "audio_too_short"),
    (ONE[:44] + bytes(2 * 100), "audio_too_short"),
])  # fmt: skip
def test_what_is_no_audio(server: Served, data: bytes, code: str) -> None:
    for stream in ("", "true"):
        response = post(server, data, stream=stream)
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (400, "file", code)


def multipart(*parts: bytes, boundary: bytes = b"cut", end: bytes = b"--cut--\r\n") -> bytes:
    return b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + end


FILE = b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n' + ONE
AS_TEXT = b'Content-Disposition: form-data; name="file"\r\n\r\nhello'
FORM = "multipart/form-data; boundary=cut"


@pytest.mark.parametrize(("content_type", "body", "status", "param"), [
    (FORM, multipart(FILE), 200, None),
    (FORM, multipart(), 400, "file"),
    (FORM, multipart(AS_TEXT), 400, "file"),
    (FORM, multipart(FILE, end=b""), 400, None),
    ("application/json", b"{}", 415, None),
])  # fmt: skip
def test_bodies_as_they_come(server: Served, content_type: str, body: bytes, status: int, param: str | None) -> None:
    response = server.client.post(server.url + PATH, content=body, headers={"Content-Type": content_type})
    assert response.status_code == status, response.text
    if status != 200:
        assert response.json()["error"]["param"] == param


def test_a_declared_2_gb_upload_is_refused_before_it_is_sent(server: Served) -> None:
    address = server.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=5) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: {FORM}\r\nContent-Length: {2 << 30}\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")


def test_an_undeclared_upload_is_counted_while_it_is_read(server: Served) -> None:
    sent = 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        yield b'--cut\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        while sent < 512 << 20:
            sent += 1 << 20
            yield bytes(1 << 20)

    before = resident_mib()
    response = httpx.post(server.url + PATH, content=body(), headers={"Content-Type": FORM}, timeout=20)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert sent < 64 << 20
    assert resident_mib() - before < 64


def resident_mib() -> float:
    """Of this process, in which the server is a thread."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


class Counted(list[EngineRequest]):
    """What the fake engine would remember, only counted: the samples would be most of the memory."""

    num_appended = 0

    def append(self, _: EngineRequest) -> None:
        self.num_appended += 1


def test_an_hour_streams_through_in_little_memory(servers: Servers) -> None:
    server = servers.start(max_model_len=8192, max_upload_mb=64)
    server.say("word")
    server.engine.requests = Counted()
    file = io.BytesIO()
    minute = (np.sin(np.arange(60 * 16_000) / 9) * 3_000).astype(np.int16)
    with soundfile.SoundFile(file, "w", 16_000, 1, format="FLAC") as flac:
        for _ in range(60):
            flac.write(minute)
    before = resident_mib()
    with server.client.stream(
        "POST", server.url + PATH, data={"stream": "true"}, files={"file": ("a.flac", file.getvalue())}, timeout=60
    ) as response:
        peak = max(resident_mib() for line in response.iter_lines() if line)
    assert server.engine.requests.num_appended >= 120
    assert peak - before < 150  # the samples are 230 MB


def test_a_client_that_leaves_aborts_all_windows_and_leaves_no_file(server: Served) -> None:
    server.say("one two three four five six", delay_s=0.1)
    open_before = len(os.listdir("/proc/self/fd"))
    stream = server.openai.audio.transcriptions.create(
        model="tiny-audio", file=("a.wav", wav(*[0.5] * 24)), stream=True
    )
    next(iter(stream))
    stream.close()
    with pytest.raises(httpx.TimeoutException):
        httpx.post(server.url + PATH, files={"file": ("a.wav", wav(*[0.5] * 24))}, timeout=0.5)
    deadline = time.monotonic() + 5
    while server.engine.num_running and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.engine.num_running == 0
    assert set(server.engine.aborted) == {request.request_id for request in server.engine.requests}
    while len(os.listdir("/proc/self/fd")) > open_before + 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(os.listdir("/proc/self/fd")) <= open_before + 2


def test_a_recording_beyond_the_limit_is_refused_from_its_header(servers: Servers) -> None:
    server = servers.start(max_transcription_seconds=5)
    error = post(server, THREE).json()["error"]
    assert (error["param"], error["code"]) == ("file", "audio_too_long")
