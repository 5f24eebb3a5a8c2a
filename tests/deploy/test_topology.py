"""Two replicas behind what may stand in front of them, with the files of deploy/: what is asked is answered.

`make topology` runs it: nginx must be installed (a package of every distribution), smg is installed by the Makefile.
"""

from __future__ import annotations

import io
import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import soundfile
from openai import OpenAI

from tests.deploy.conftest import ROOT, Replica, client_of, free_port, wait_for
from tests.deploy.load import SAID, ask, ask_streaming, question, under_load

pytestmark = pytest.mark.topology

SMG = ROOT / ".topology/bin/smg"


def nginx(replicas: list[Replica], folder: Path, port: int) -> list[str]:
    """With deploy/nginx.conf, whose addresses alone are changed."""
    program = shutil.which("nginx") or pytest.fail("nginx is not installed")
    text = (ROOT / "deploy/nginx.conf").read_text()
    for index, replica in enumerate(replicas):
        assert f"tympan-{index}:8000" in text
        text = text.replace(f"tympan-{index}:8000", f"127.0.0.1:{replica.port}")
    text = text.replace("listen 8000;", f"listen 127.0.0.1:{port};").replace("/tmp/nginx", str(folder / "nginx"))
    owner = f"user {pwd.getpwuid(os.getuid()).pw_name};\n" if os.getuid() == 0 else ""  # else it gives up root
    (folder / "nginx.conf").write_text(owner + text)
    return [program, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", "daemon off;"]


def smg(replicas: list[Replica], folder: Path, port: int) -> list[str]:
    """As docs/operations.md starts it."""
    if not SMG.exists():
        pytest.fail("run `make topology`, which installs smg")
    workers = [replica.url for replica in replicas]
    return [
        str(SMG), "launch", "--host", "127.0.0.1", "--port", str(port), "--worker-urls", *workers,
        "--policy", "cache_aware", "--health-check-endpoint", "/ready", "--health-check-interval-secs", "2",
        "--cb-timeout-duration-secs", "2", "--prometheus-port", str(free_port()),
    ]  # fmt: skip


@pytest.fixture(scope="module", params=[nginx, smg], ids=["nginx", "smg"])
def front(
    request: pytest.FixtureRequest, replicas: list[Replica], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """What stands in front of both replicas, ready. -> its address."""
    folder = tmp_path_factory.mktemp("front")
    port = free_port()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(request.param(replicas, folder, port), stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def client(front: str, ready_replicas: list[Replica]) -> OpenAI:
    """With everything up."""
    client = client_of(front)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:  # a router may take a moment to believe in a replica again
        try:
            if all(SAID in ask(client) for _ in range(4)):
                return client
        except openai.OpenAIError:
            pass
        time.sleep(0.2)
    raise AssertionError("the replicas are up, and what stands in front of them does not see it")


def test_answers_come_through_whole_and_in_pieces(client: OpenAI) -> None:
    assert SAID in ask(client)
    arrivals = []
    for chunk in client.chat.completions.create(
        **question(stream=True, max_tokens=150, extra_body={"ignore_eos": True, "min_tokens": 150})
    ):
        arrivals += [time.monotonic()] if chunk.choices and chunk.choices[0].delta.content else []
    assert len(arrivals) > 20
    gaps = np.diff(arrivals)
    assert np.count_nonzero(gaps > 1e-4) > len(gaps) / 2, "a stream that arrives in one piece was held back"


def test_large_bodies_come_through(client: OpenAI, front: str) -> None:
    samples = np.random.default_rng(0).standard_normal((25 * 48_000, 2)).astype(np.float32) * 0.1
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 48_000, format="WAV", subtype="FLOAT")
    assert len(buffer.getvalue()) > 9 << 20
    answer = client.audio.transcriptions.create(model="tympan-tiny", file=("a.wav", buffer.getvalue()))
    assert isinstance(answer.text, str)
    assert httpx.get(f"{front}/v1/models", trust_env=False).json()["data"][0]["id"] == "tympan-tiny"


def test_errors_keep_their_status_and_shape(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**question() | {"temperature": 9})
    assert caught.value.param == "temperature"


def test_a_rolling_restart_under_load_loses_nothing(client: OpenAI, ready_replicas: list[Replica]) -> None:
    with under_load(client) as tally:
        for replica in ready_replicas:
            assert replica.drain() == 0
            replica.start()
            time.sleep(3)  # a router that probes has seen it by then
    assert tally.lost_whole == tally.lost_streams == []
    assert tally.num_answers > 20


def test_a_replica_that_is_killed_costs_only_the_streams_that_it_had_begun(
    client: OpenAI, ready_replicas: list[Replica]
) -> None:
    with under_load(client) as tally:
        time.sleep(2)
        ready_replicas[0].kill()
        time.sleep(5)
    assert tally.lost_whole == []
    assert len(tally.lost_streams) <= 2, "one of each streaming client"
    assert tally.num_answers > 20
    assert SAID in ask_streaming(client)
