"""A server whose model two processes share: what it answers over HTTP, and what becomes of it when one dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.integration.conftest import ServerProcess, run_server, start_server, text
from tests.integration.test_bundled import ASKED, CLIPS, ask, clip, user


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """The bundled checkpoint on two ranks."""
    started = start_server("--tensor-parallel-size", "2", "--device", "cpu", "--engine-restarts", "0")
    yield started
    started.process.kill()


def test_every_fixture_is_understood_at_once(server: ServerProcess) -> None:
    def answer(name: str, question: str) -> str:
        return ask(server, user(*[clip(name), text(question)][: 1 + bool(question)]))

    with ThreadPoolExecutor(len(ASKED)) as pool:
        answers = list(pool.map(answer, *zip(*ASKED, strict=True)))
    assert answers == [CLIPS[name]["answers"][question] for name, question in ASKED]
    assert any("2 x cpu" in line for line in server.lines)


def test_structured_output_and_logprobs(server: ServerProcess) -> None:
    schema = {"type": "object", "properties": {"words": {"type": "integer"}}, "required": ["words"]}
    answer = server.openai.chat.completions.create(
        model="tympan-tiny",
        messages=[user(clip("digits_four_two_seven.wav"), text("How many?"))],  # type: ignore[list-item]
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "count", "schema": {**schema, "additionalProperties": False}, "strict": True},
        },
        logprobs=True,
        top_logprobs=3,
        max_tokens=200,
    )
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(answer.choices[0].message.content or "")["words"], int)
    assert answer.choices[0].logprobs is not None


def worker_pid(server: ServerProcess) -> int:
    """Rank 1: the child of the engine's process."""
    command = ["pgrep", "-P", str(server.engine_pid()), "-f", "spawn_main"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def listening_addresses(pid: int) -> list[str]:
    """Addresses at which a process accepts connections, as /proc/net has them."""
    files = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink()]
    tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table.splitlines()]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in files]


def test_ranks_listen_on_loopback_only(server: ServerProcess) -> None:
    found = [*listening_addresses(server.engine_pid()), *listening_addresses(worker_pid(server))]
    assert found, "they are connected somehow"
    assert set(found) == {"0100007F"}


def test_a_killed_rank_ends_the_server_with_its_name(server: ServerProcess) -> None:
    engine = server.engine_pid()
    os.kill(worker_pid(server), signal.SIGKILL)
    assert server.process.wait(60) == 1
    assert any("the engine has died: rank 1 has ended (exit code -9)" in line for line in server.lines)
    assert subprocess.run(["pgrep", "-P", str(engine)], capture_output=True).returncode == 1


def test_a_size_that_does_not_divide_is_one_sentence() -> None:
    run = run_server("--tensor-parallel-size", "3", "--device", "cpu")
    assert run.returncode == 1
    assert "--tensor-parallel-size 3 does not divide the checkpoint's num_attention_heads, 4" in run.stderr
    assert "Traceback" not in run.stderr
