"""The batch runner as a process with the bundled checkpoint: killed in the middle, it goes on where it was."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.integration.conftest import ROOT
from tests.integration.test_bundled import DIGITS, SPEECH
from tests.integration.test_offline import ENVIRONMENT, MARK, left_behind, mark

__all__ = ["mark"]

NUM_REQUESTS = 100
WAV = base64.b64encode((SPEECH / DIGITS).read_bytes()).decode()


def chat(index: int) -> dict[str, Any]:
    """One that takes a while."""
    parts = [
        {"type": "input_audio", "input_audio": {"data": WAV, "format": "wav"}},
        {"type": "text", "text": "What does the person say?"},
    ]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 40, "ignore_eos": True, "temperature": 0}
    return {"custom_id": f"r{index}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def start(requests: Path, output: Path, mark: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tympan.batch", "-i", str(requests), "-o", str(output), "--max-num-seqs", "4"]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT | {MARK: mark}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_lines(process: subprocess.Popen[str], output: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while num_lines(output) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_stopped_in_the_middle_and_taken_up_again(tmp_path: Path, mark: str) -> None:
    requests, output = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    requests.write_text("".join(json.dumps(chat(index)) + "\n" for index in range(NUM_REQUESTS)))
    done = 0
    for stop, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        process = start(requests, output, mark)
        wait_for_lines(process, output, done + 10)
        os.kill(process.pid, stop)
        _, told = process.communicate(timeout=30)
        assert process.returncode == status, told
        assert not left_behind(mark)
        done = num_lines(output)
        assert done < NUM_REQUESTS
        with output.open("ab") as file:  # as a kill within a write would leave it
            file.write(output.read_bytes()[:100])
    process = start(requests, output, mark)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert f"{NUM_REQUESTS - done} answered, {done} in earlier runs, 0 failed" in told
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(result["custom_id"] for result in results) == sorted(f"r{index}" for index in range(NUM_REQUESTS))
    assert {result["response"]["body"]["usage"]["completion_tokens"] for result in results} == {40}
    assert not left_behind(mark)


def test_an_engine_that_dies_stops_the_run(tmp_path: Path, mark: str) -> None:
    requests, output = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    requests.write_text("".join(json.dumps(chat(index)) + "\n" for index in range(NUM_REQUESTS)))
    process = start(requests, output, mark)
    wait_for_lines(process, output, 5)
    engine = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "spawn_main"], capture_output=True, text=True)
    os.kill(int(engine.stdout.split()[0]), signal.SIGKILL)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "the same command goes on from here" in told
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert 5 <= len(results) < NUM_REQUESTS
    assert {result["response"]["status_code"] for result in results} == {200}
