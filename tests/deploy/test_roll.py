"""deploy/roll.py against replicas and a router that are no more than their answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deploy.roll import RollError, roll
from tests.deploy.conftest import ROOT
from tests.documentation.code_blocks import DEFAULT, Block, all_blocks, look_like_the_repository, replaced

SEEN_AFTER_SECONDS = 0.5
"""What the router takes to see that a replica is back."""


class World:
    """Two replicas and a router, all behind one port: /0/ready, /1/ready, /router/workers."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.is_ready = [True, True]
        self.routed_since: dict[int, float] = {0: 0.0, 1: 0.0}
        world = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(*world.get(self.path))

            def do_DELETE(self) -> None:
                number = int(self.path.removeprefix("/router/workers/id-"))
                world.log.append(f"out {number}")
                del world.routed_since[number]
                self._answer(202, {})

            def do_POST(self) -> None:
                url = json.loads(self.rfile.read(int(self.headers["content-length"])))["url"]
                world.log.append(f"in {url[-1]}")
                world.routed_since[int(url[-1])] = time.monotonic() + SEEN_AFTER_SECONDS
                self._answer(202, {})

            def _answer(self, status: int, body: object) -> None:
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.replicas = [f"{self.url}/0", f"{self.url}/1"]
        threading.Thread(target=self.server.serve_forever, args=(0.02,)).start()

    def get(self, path: str) -> tuple[int, object]:
        if path == "/router/workers":
            return 200, {"workers": [
                {"id": f"id-{number}", "url": self.replicas[number], "is_healthy": time.monotonic() >= since}
                for number, since in self.routed_since.items()
            ]}  # fmt: skip
        if path.endswith("/ready"):
            return (200 if self.is_ready[int(path[1])] else 503), {}
        if path.startswith("/restart/"):
            self.restart(("one", "two").index(path.removeprefix("/restart/")))
            return 200, {}
        return 404, {}

    def restart(self, number: int) -> None:
        """It is ready again a moment after the command has returned."""
        assert self.is_ready[1 - number], "both are out"
        self.log.append(f"restart {number}")
        self.is_ready[number] = False
        threading.Timer(0.3, lambda: self.is_ready.__setitem__(number, True)).start()


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.server.shutdown()
    world.server.server_close()


def test_the_next_waits_until_the_router_asks_the_one_before_again(world: World) -> None:
    def restart(number: int) -> None:
        other = world.routed_since[1 - number]
        assert time.monotonic() >= other, "the router does not see the other one yet"
        world.restart(number)

    restarts = {url: (lambda number=number: restart(number)) for number, url in enumerate(world.replicas)}
    roll(restarts, f"{world.url}/router", settle_s=0, timeout_s=5)
    assert world.log == ["out 0", "restart 0", "in 0", "out 1", "restart 1", "in 1"]
    assert all(time.monotonic() >= since for since in world.routed_since.values())


def test_without_a_router_readiness_alone_counts(world: World) -> None:
    restarts = {url: (lambda number=number: world.restart(number)) for number, url in enumerate(world.replicas)}
    roll(restarts, settle_s=0, timeout_s=5)
    assert world.log == ["restart 0", "restart 1"]


def test_one_that_does_not_come_back_ends_the_roll(world: World) -> None:
    def never_again() -> None:
        world.is_ready[0] = False

    with pytest.raises(RollError, match=r"not ready: .*/0$"):
        roll({world.replicas[0]: never_again, world.replicas[1]: never_again}, settle_s=0, timeout_s=0.5)
    assert world.log == []


def test_a_router_that_is_none_is_told_at_once(world: World) -> None:
    with pytest.raises(RollError, match="404"):
        roll({world.replicas[0]: lambda: None}, f"{world.url}/elsewhere", settle_s=0, timeout_s=60)


def test_the_command_line(world: World) -> None:
    def status_of(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "deploy/roll.py", "--settle", "0", *arguments]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
        return run.returncode, run.stderr

    good, bad = f"{world.replicas[0]}=true", f"{world.replicas[1]}=exit 3"
    assert status_of(good)[0] == 0
    status, output = status_of(good, bad)
    assert status == 1
    assert output.endswith("`exit 3` ended with status 3\n")
    assert status_of("true")[0] == 2


@pytest.mark.parametrize("block", all_blocks("run by tests/deploy/test_roll.py"), ids=lambda block: block.name)
def test_the_command_of_the_documentation(block: Block, world: World, tmp_path: Path) -> None:
    """As pasted: its hosts are those of the world, and `ssh HOST sudo systemctl restart tympan` restarts one."""
    environment = look_like_the_repository(tmp_path)
    commands = tmp_path / "commands"
    commands.mkdir()
    ssh = f'#!/bin/sh\ntest "$2 $3 $4 $5" = "sudo systemctl restart tympan" && curl -fsS {world.url}/restart/$1\n'
    (commands / "ssh").write_text(ssh, encoding="ascii")
    (commands / "ssh").chmod(0o755)
    environment["PATH"] = f"{commands}{os.pathsep}{environment['PATH']}"
    hosts = {f"http://10.0.0.{number + 1}:8000": url for number, url in enumerate(world.replicas)}
    command = replaced(block.code, {DEFAULT: f"{world.url}/router", **hosts})
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=tmp_path, env=environment, capture_output=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert world.log == ["out 0", "restart 0", "in 0", "out 1", "restart 1", "in 1"]
