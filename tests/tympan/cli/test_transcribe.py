"""`tympan transcribe` without a server: which files it writes, which it leaves alone, what it says of failures."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from tympan.cli import transcribe
from tympan.cli.main import app

SPEECH = Path(__file__).resolve().parents[3] / "tests" / "fixtures" / "speech"
URL = "http://127.0.0.1:9/v1"
RUNNER = CliRunner()


class FakeServer:
    """Answers with the name of the file and the format; refuses files called bad."""

    def __init__(self) -> None:
        self.forms: list[bytes] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        form = await request.aread()
        self.forms.append(form)
        name, kind = (
            re.search(pattern, form)
            for pattern in (rb'filename="(.*?)"', rb"\r\n\r\n(text|srt|vtt|verbose_json)\r\n")
        )
        assert name is not None
        assert kind is not None
        if name[1].startswith(b"bad"):
            return httpx.Response(400, json={"error": {"message": "It is no audio."}})
        return httpx.Response(200, text=f"{name[1].decode()} {kind[1].decode()}\n")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    fake = FakeServer()

    @contextlib.asynccontextmanager
    async def client(_: object) -> AsyncIterator[httpx.AsyncClient]:
        async with httpx.AsyncClient(base_url=URL, transport=httpx.MockTransport(fake)) as connected:
            yield connected

    monkeypatch.setattr(transcribe, "_server", client)
    return fake


@pytest.fixture
def clips(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in ("one.wav", "bad.wav", "two.mp3")]
    for path in paths:
        path.write_bytes(b"sound")
    return paths


def test_a_failure_is_named_and_the_others_are_done(server: FakeServer, clips: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    arguments = ["transcribe", "--url", URL, "--format", "srt", "--output-dir", str(out), *map(str, clips)]
    ended = RUNNER.invoke(app, [*arguments, str(tmp_path / "gone.wav")])
    assert ended.exit_code == 1
    assert sorted(ended.stderr.splitlines()) == [
        f"tympan: {clips[1]}: HTTP 400: It is no audio.",
        f"tympan: {tmp_path / 'gone.wav'}: No such file or directory",
    ]
    assert {path.name: path.read_text() for path in out.iterdir()} == {
        "one.srt": "one.wav srt\n", "two.srt": "two.mp3 srt\n"
    }  # fmt: skip


def test_nothing_is_overwritten_without_force(server: FakeServer, clips: list[Path], tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("mine")
    arguments = ["transcribe", "--url", URL, "--output-dir", str(tmp_path), str(clips[0]), str(clips[2])]
    ended = RUNNER.invoke(app, arguments)
    assert ended.exit_code == 1
    assert f"{clips[0]}: {tmp_path / 'one.txt'} exists: --force overwrites it" in ended.stderr
    assert (tmp_path / "one.txt").read_text() == "mine"
    assert (tmp_path / "two.txt").read_text() == "two.mp3 text\n"
    assert len(server.forms) == 1
    assert RUNNER.invoke(app, [*arguments, "--force"]).exit_code == 0
    assert (tmp_path / "one.txt").read_text() == "one.wav text\n"


def test_one_file_goes_to_standard_output(server: FakeServer, clips: list[Path]) -> None:
    arguments = ["transcribe", "--url", URL, "--language", "en", "--model", "m", "--format", "json", str(clips[0])]
    ended = RUNNER.invoke(app, arguments)
    assert (ended.exit_code, ended.stdout, ended.stderr) == (0, "one.wav verbose_json\n", "")
    assert b'name="language"\r\n\r\nen\r\n' in server.forms[0]
    assert b'name="model"\r\n\r\nm\r\n' in server.forms[0]


def test_what_cannot_be_meant(clips: list[Path], tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for files, told in (
        ([clips[0], clips[2]], "several files need --output-dir"),
        ([clips[0], tmp_path / "sub" / "one.flac", "--output-dir", tmp_path], "would both be written to"),
        ([clips[0], "--output-dir", clips[2]], "two.mp3: File exists"),
    ):
        ended = RUNNER.invoke(app, ["transcribe", "--url", URL, *map(str, files)])
        assert (ended.exit_code, told in ended.stderr) == (2, True), ended.stderr
    assert RUNNER.invoke(app, ["transcribe", str(clips[0]), "--format", "docx"]).exit_code == 2


def test_nobody_there_is_one_sentence(clips: list[Path]) -> None:
    ended = RUNNER.invoke(app, ["transcribe", "--url", URL, str(clips[0])])
    assert ended.exit_code == 1
    assert ended.stderr.startswith(f"tympan: nobody answers at {URL}: ")


def test_lengths_come_from_headers(clips: list[Path]) -> None:
    assert transcribe.duration_of(SPEECH / "digits_four_two_seven.wav") == pytest.approx(1.189, abs=0.01)
    assert transcribe.duration_of(clips[2]) == 0.0


def test_the_bar_counts_seconds_of_audio(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with transcribe.Bar([30.0, 0.0, 12.0]) as bar:
        bar.done(0)
        bar.say("tympan: a.wav: no")
        bar.done(1)
        bar.done(2)
    shown = capsys.readouterr().err
    assert "3/3 files" in shown
    assert "42 of 42 s of audio" in shown
    assert "s/s" in shown
