"""`tympan chat` without a server: what it sends, what it keeps, what it says of failures."""

from __future__ import annotations

import base64
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from tympan.cli.endpoint import Endpoint
from tympan.cli.main import app

URL = "http://127.0.0.1:9/v1"


class FakeServer:
    """Streams the next of `answers`, or refuses with it; keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: list[str | httpx.Response] = []
        self.bodies: list[Any] = []
        self.headers: list[httpx.Headers] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.headers.append(request.headers)
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "first"}]})
        assert request.url.path == "/v1/chat/completions"
        self.bodies.append(json.loads(request.content))
        answer = self.answers.pop(0)
        if isinstance(answer, httpx.Response):
            return answer
        events: list[dict[str, Any]] = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
        events += [{"choices": [{"delta": {"content": word}}]} for word in answer.split(" ")]
        events += [{"choices": [], "usage": {"completion_tokens": 3}}]
        lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        return httpx.Response(200, text=lines + ": keep-alive\n\ndata: [DONE]\n\n")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    fake = FakeServer()

    def client(self: Endpoint) -> httpx.Client:
        return httpx.Client(**self.options, transport=httpx.MockTransport(fake))

    monkeypatch.setattr(Endpoint, "client", client)
    return fake


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Type lines into a chat on a terminal. -> what it wrote to stdout and stderr."""

    def typed(*lines: str, arguments: tuple[str, ...] = ()) -> tuple[str, str]:
        left: Iterator[str] = iter(lines)

        def read(_: str = "") -> str:
            line = next(left, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        with pytest.raises(SystemExit) as ended:
            app(["chat", "--url", URL, *arguments])
        assert ended.value.code == 0
        return capsys.readouterr()

    return typed


def test_a_conversation_grows(server: FakeServer, talk: Callable[..., tuple[str, str]]) -> None:
    server.answers = ["Hello you", "Still here"]
    out, err = talk("Hi", "", "And now?", "/quit", "never asked", arguments=("--system", "Be kind."))
    assert out == "Helloyou\nStillhere\n"
    assert [message["role"] for message in server.bodies[1]["messages"]] == ["system", "user", "assistant", "user"]
    assert server.bodies[1]["messages"][2]["content"] == "Helloyou"
    assert server.bodies[0]["model"] == "first"
    assert "tokens/s" in err


def test_audio_goes_before_the_question_and_once(
    server: FakeServer, talk: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    clip = tmp_path / "a clip.MP3"
    clip.write_bytes(b"sound")
    server.answers = ["yes", "no"]
    talk(f"/audio '{clip}' '{clip}'", "What is it?", "Sure?")
    parts = server.bodies[0]["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["input_audio", "input_audio", "text"]
    assert base64.b64decode(parts[0]["input_audio"]["data"]) == b"sound"
    assert parts[0]["input_audio"]["format"] == "mp3"
    assert server.bodies[1]["messages"][2] == {"role": "user", "content": "Sure?"}


def test_a_failure_leaves_the_conversation_as_it_was(
    server: FakeServer, talk: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    clip = tmp_path / "a.wav"
    clip.write_bytes(b"sound")
    refusal = httpx.Response(400, json={"error": {"message": "It is no audio."}})
    server.answers = [refusal, "fine"]
    out, err = talk(f"/audio {clip}", "What?", "And this?")
    assert "It is no audio." in err
    assert out == "fine\n"
    [message] = server.bodies[1]["messages"]
    assert [part["type"] for part in message["content"]] == ["input_audio", "text"]


def test_commands(server: FakeServer, talk: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    server.answers = ["one", "two", "three"]
    _, err = talk(
        "Hi", f"/save {saved}", f"/save {saved}", "/reset", "Ho", "/send", "/nothing", "/audio no-such-file"
    )
    body = json.loads(saved.read_text())
    assert [message["content"] for message in body["messages"]] == ["Hi", "one"]
    assert server.bodies[1]["messages"] == [{"role": "user", "content": "Ho"}]
    for told in ("exists", "there is no audio to send", "there is no /nothing", "no-such-file: No such file"):
        assert told in err


def test_the_microphone(
    server: FakeServer, talk: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stream:
        def __init__(self, callback: Callable[..., None], **_: object) -> None:
            self.callback = callback

        def __enter__(self) -> None:
            self.callback(b"\1\0" * 8000, 8000, None, None)

        def __exit__(self, *_: object) -> None:
            pass

    fake = types.SimpleNamespace(RawInputStream=Stream, PortAudioError=RuntimeError, sleep=lambda _: None)
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    server.answers = ["heard"]
    _, err = talk("/mic 0.5", "/send")
    [message] = server.bodies[0]["messages"]
    assert base64.b64decode(message["content"][0]["input_audio"]["data"])[:4] == b"RIFF"
    assert "0.5 s" in err


def test_no_microphone_is_told(
    server: FakeServer, talk: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    _, err = talk("/mic", "/mic soon")
    assert "pip install 'tympan[microphone]'" in " ".join(err.split())
    assert "no number of seconds" in err
    assert not server.bodies


def test_a_question_through_a_pipe(server: FakeServer, tmp_path: Path) -> None:
    clip = tmp_path / "a.wav"
    clip.write_bytes(b"sound")
    server.answers = ["four two"]
    arguments = ["chat", "--url", URL, "--api-key", "secret", "--max-tokens", "9", "--temperature", "0", str(clip)]
    done = CliRunner().invoke(app, arguments, input="What?\n")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "fourtwo\n", "")
    assert (server.bodies[0]["max_tokens"], server.bodies[0]["temperature"]) == (9, 0)
    assert server.headers[-1]["authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (httpx.Response(401), "the server asks for a key: give it by --api-key or in OPENAI_API_KEY"),
        (httpx.Response(400, json={"error": {"message": "Too long."}}), "HTTP 400: Too long."),
        (httpx.Response(502, text="<html> bad\ngateway"), "HTTP 502: <html> bad gateway"),
        (httpx.Response(200, text='data: {"error": {"message": "It broke."}}\n\n'), "It broke."),
    ],
)
def test_failures_through_a_pipe(server: FakeServer, answer: httpx.Response, told: str) -> None:
    server.answers = [answer]
    done = CliRunner().invoke(app, ["chat", "--url", URL], input="What?")
    assert (done.exit_code, done.stderr) == (1, f"tympan: {told}\n")


def test_nothing_to_ask_and_nobody_there() -> None:
    unused = CliRunner().invoke(app, ["chat", "--url", URL, "--model", "m"], input=" ")
    assert unused.exit_code == 2
    gone = CliRunner().invoke(app, ["chat", "--url", URL], input="What?")
    assert gone.exit_code == 1
    assert gone.stderr.startswith(f"tympan: nobody answers at {URL}: start a server with `tympan serve`")
