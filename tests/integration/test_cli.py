"""The command `tympan` as a process, against the bundled checkpoint's server."""

from __future__ import annotations

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
