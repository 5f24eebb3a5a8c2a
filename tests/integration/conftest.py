"""Real servers: `python -m server` in a process, on a free port of this machine."""

from __future__ import annotations

import base64
import io
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from openai import OpenAI

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")


@dataclass
class ServerProcess:
    """One running server."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str] = field(default_factory=list)
    """What it has printed so far."""

    @property
    def openai(self) -> OpenAI:
        """OpenAI's own client, which does not try again."""
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    @property
    def http(self) -> httpx.Client:
        """A plain client."""
        return httpx.Client(base_url=self.url, timeout=120)

    def engine_pid(self) -> int:
        """The engine's process: the child that spawn started."""
        found = subprocess.run(
            ["pgrep", "-P", str(self.process.pid), "-f", "spawn_main"], capture_output=True, text=True
        )
        return int(found.stdout.split()[0])

    def stop(self) -> int:
        """Ask it to end, as Ctrl-C does: without a grace for balancers. -> its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)


def start_server(*arguments: str) -> ServerProcess:
    """Start a server and wait for its start-up screen."""
    process = subprocess.Popen(
        [sys.executable, "-m", "server", "--port", "0", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # tiny models gain nothing from more
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    server = ServerProcess(process, "")
    started = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            server.lines.append(line)
            if not server.url and line.startswith("Tympan serves") and (address := ADDRESS.search(line)):
                server.url = address.group()
                started.set()
        started.set()

    threading.Thread(target=read, daemon=True).start()
    if not started.wait(120) or not server.url:
        process.kill()
        raise RuntimeError("the server did not start:\n" + "".join(server.lines))
    return server


def run_server(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a server that is expected to end by itself."""
    command = [sys.executable, "-m", "server", "--port", "0", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="session")
def reference_server(gqa_folder: Path) -> Iterator[ServerProcess]:
    """The tiny random checkpoint, served; clips may be fetched from this machine."""
    server = start_server(
        "--model", str(gqa_folder), "--served-model-name", "random", "--allowed-private-media-hosts", "127.0.0.1",
        "--dtype", "float32", "--max-num-seqs", "16",
    )  # fmt: skip
    yield server
    server.stop()


@pytest.fixture(scope="session")
def bundled_server() -> Iterator[ServerProcess]:
    """What a fresh install serves with no arguments."""
    server = start_server()
    yield server
    server.stop()


def wav(samples: NDArray[np.float32], sample_rate: int = 16000) -> bytes:
    """Float WAV bytes: nothing is lost on the way."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, sample_rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def input_audio(data: bytes, declared: str = "wav") -> dict[str, object]:
    """OpenAI's audio part."""
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": declared}}


def data_url(data: bytes) -> str:
    """The clip inside a URL."""
    return "data:audio/wav;base64," + base64.b64encode(data).decode()


def text(content: str) -> dict[str, str]:
    """A text part."""
    return {"type": "text", "text": content}
