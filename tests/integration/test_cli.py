"""The command `tympan` as a process, against the bundled checkpoint's server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.integration.conftest import ROOT, ServerProcess

SPEECH = Path("tests/fixtures/speech")


def tympan(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command that ends by itself."""
    command = [sys.executable, "-m", "tympan", *arguments]
    return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=120)


def test_a_question_about_a_file_through_a_pipe(bundled_server: ServerProcess) -> None:
    url = f"{bundled_server.url}/v1"
    clip = str(SPEECH / "digits_four_two_seven.wav")
    done = tympan("chat", "--url", url, "--temperature", "0", clip, stdin="What does the person say?\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "four two seven\n", "")
    voice = tympan("chat", "--url", url, str(SPEECH / "sum_three_plus_four.wav"))
    assert "seven" in voice.stdout
    broken = tympan("chat", "--url", url, "pyproject.toml")
    assert (broken.returncode, broken.stdout) == (1, "")
    assert broken.stderr.startswith("tympan: HTTP 400: ")


def test_transcripts_are_the_same_with_and_without_a_server(bundled_server: ServerProcess, tmp_path: Path) -> None:
    files = [str(SPEECH / name) for name in ("digits_four_two_seven.wav", "command_stop.wav")]
    served, own = tmp_path / "served", tmp_path / "own"
    url = f"{bundled_server.url}/v1"
    for folder, target in ((served, ("--url", url)), (own, ())):
        done = tympan("transcribe", "--format", "srt", "--output-dir", str(folder), *target, *files)
        assert done.returncode == 0, done.stderr
    texts = {path.name: path.read_text() for path in served.iterdir()}
    assert texts == {path.name: path.read_text() for path in own.iterdir()}
    assert texts["digits_four_two_seven.srt"] == "1\n00:00:00,000 --> 00:00:01,189\nfour two seven\n\n"
    printed = tympan("transcribe", "--url", url, "--format", "json", files[1])
    assert json.loads(printed.stdout)["segments"][0]["text"] == "stop"


def test_load_is_measured(bundled_server: ServerProcess) -> None:
    url = f"{bundled_server.url}/v1"
    sizes = ["--requests", "3", "--warmup", "0", "--concurrency", "2", "--clip-seconds", "1", "--output-tokens", "4"]
    done = tympan("bench", "--url", url, "--json", *sizes)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert (figures["requests"], figures["num_errors"], figures["model"]) == (3, 0, "tympan-tiny")
    assert 0 < figures["ttft_s"]["p50"] <= figures["end_to_end_s"]["p99"]


def test_a_start_that_is_not_watched_logs_its_progress(bundled_server: ServerProcess) -> None:
    log = "".join(bundled_server.lines)
    assert "starting the engine" in log
    assert "tensors" in log
    assert "\r" not in log
