"""Replicas of the bundled checkpoint on this machine, and what is started in front of them."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from deploy.roll import RollError

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120


def free_port() -> int:
    """One that was free a moment ago, and that no outgoing connection is given meanwhile."""
    while True:
        port = random.randrange(20_000, 32_000)  # below what Linux gives
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_for(url: str, process: subprocess.Popen[bytes] | None = None) -> None:
    """Until it answers 200."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process is None or process.poll() is None, f"what should answer {url} has ended"
        try:
            if httpx.get(url, timeout=2, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"{url} is not ready after {START_SECONDS} s")


@dataclass
class Replica:
    """A server that can be started again on its port."""

    port: int
    log: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """And wait until it is ready."""
        command = [sys.executable, "-m", "server", "--port", str(self.port), "--shutdown-timeout", "60"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        wait_for(f"{self.url}/ready", self.process)

    def drain(self) -> int:
        """Ask it to end. -> its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)

    def restart(self) -> None:
        """As a service manager does. Raises RollError: it did not drain."""
        status = self.drain()
        if status:
            raise RollError(f"a drained replica ended with status {status}")
        self.start()

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Replica]]:
    """Two, ready."""
    folder = tmp_path_factory.mktemp("replicas")
    both = [Replica(free_port(), folder / f"replica{index}.log") for index in range(2)]
    try:
        for replica in both:
            replica.start()
        yield both
    finally:
        for replica in both:
            replica.kill()


@pytest.fixture
def ready_replicas(replicas: list[Replica]) -> list[Replica]:
    """Both up, whatever the test before did to them."""
    for replica in replicas:
        if replica.process is None or replica.process.poll() is not None:
            replica.start()
    return replicas


def client_of(url: str) -> OpenAI:
    """OpenAI's own, which does not try again: whatever is lost shows."""
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


Ask = Callable[[str], str]
