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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import soundfile
from openai import OpenAI

from deploy.roll import Smg, roll
from tests.deploy.conftest import ROOT, Replica, client_of, free_port, wait_for
from tests.deploy.load import CHATTING, FILE, SAID, ask, ask_streaming, question, under_load, upload

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
    """By deploy/smg.sh, as docs/operations.md starts it."""
    if not SMG.exists():
        pytest.fail("run `make topology`, which installs smg")
    workers = [replica.url for replica in replicas]
    return [
        "env", f"PATH={SMG.parent}:{os.environ['PATH']}", "sh", str(ROOT / "deploy/smg.sh"),
        "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port()), "--worker-urls", *workers,
    ]  # fmt: skip


@dataclass(frozen=True)
class Front:
    """What stands in front of both replicas."""

    url: str
    router: str | None
    """What says which replicas are asked, where there is such a thing."""


@pytest.fixture(scope="module", params=[nginx, smg], ids=["nginx", "smg"])
def front(
    request: pytest.FixtureRequest, replicas: list[Replica], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Front]:
    """Ready."""
    folder = tmp_path_factory.mktemp("front")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(request.param(replicas, folder, port), stdout=log, stderr=log)
    try:
        wait_for(f"{url}/health", process)
        yield Front(url, url if request.param is smg else None)
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def client(front: Front, ready_replicas: list[Replica]) -> OpenAI:
    """With everything up."""
    client = client_of(front.url)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:  # a router may take a moment to believe in a replica again
        try:
            all_are_asked = not front.router or Smg(front.router, 30).routed() == {one.url for one in ready_replicas}
            if all_are_asked and all(SAID in ask(client) for _ in range(4)):
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


def test_large_bodies_come_through(client: OpenAI, front: Front) -> None:
    samples = np.random.default_rng(0).standard_normal((25 * 48_000, 2)).astype(np.float32) * 0.1
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 48_000, format="WAV", subtype="FLOAT")
    assert len(buffer.getvalue()) > 9 << 20
    answer = client.audio.transcriptions.create(model="tympan-tiny", file=("a.wav", buffer.getvalue()))
    assert isinstance(answer.text, str)
    assert httpx.get(f"{front.url}/v1/models", trust_env=False).json()["data"][0]["id"] == "tympan-tiny"


def test_errors_keep_their_status_and_shape(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**question() | {"temperature": 9})
    assert caught.value.param == "temperature"


def test_a_rolling_restart_under_load_loses_nothing(
    client: OpenAI, front: Front, ready_replicas: list[Replica]
) -> None:
    """By deploy/roll.py: a restart while the router does not yet see the other replica would leave it with none."""
    with under_load(client) as tally:
        roll({replica.url: replica.restart for replica in ready_replicas}, front.router, timeout_s=120)
    assert tally.lost == []
    assert tally.num_answers > 20


def test_a_replica_that_is_killed_costs_only_the_streams_that_it_had_begun(
    client: OpenAI, ready_replicas: list[Replica]
) -> None:
    """And behind smg the uploads of the next two seconds, until probes have told it."""
    with under_load(client, CHATTING) as tally:
        time.sleep(2)
        ready_replicas[0].kill()
        time.sleep(5)
    assert tally.lost_whole == []
    assert len(tally.lost_streams) <= 2, "one of each streaming client"
    assert tally.num_answers > 20
    assert SAID in ask_streaming(client)
    assert SAID in upload(client).lower()


def test_a_conversation_stays_where_its_clip_and_prefix_are_cached(
    client: OpenAI, front: Front, ready_replicas: list[Replica]
) -> None:
    """By X-Session-Id; smg also by how the conversation begins. Both replicas have some of them."""
    for with_session in (True, False) if front.router else (True,):
        before = [num_served(replica) for replica in ready_replicas]
        with ThreadPoolExecutor(8) as pool:
            talks = [pool.submit(converse, client, number, with_session) for number in range(8)]
        for talk in talks:
            num_cached, num_audio = talk.result()
            assert num_cached > num_audio > 0, "the second turn ran where the first had not"
        assert all(num_served(replica) > was for replica, was in zip(ready_replicas, before, strict=True))


def converse(client: OpenAI, number: int, with_session: bool) -> tuple[int, int]:
    """Two turns about a clip of this conversation's own. -> of the second: cached tokens, and those of the clip."""
    samples, rate = soundfile.read(FILE, dtype="float32")
    buffer = io.BytesIO()
    soundfile.write(buffer, np.roll(samples, 100 * (number + 1)), rate, format="WAV")
    words = f"{'ABCDEFGH'[number] * (40 + with_session)}: what does the person say?"
    messages = question(words, buffer.getvalue())["messages"]
    headers = {"X-Session-Id": f"conversation-{number}-{with_session}"} if with_session else {}
    session = client.with_options(default_headers=headers)
    first = session.chat.completions.create(model="tympan-tiny", messages=messages, max_tokens=16)
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content or "Nothing."},
        {"role": "user", "content": "Say it again."},
    ]
    usage = session.chat.completions.create(model="tympan-tiny", messages=messages, max_tokens=4).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    return usage.prompt_tokens_details.cached_tokens or 0, usage.prompt_tokens_details.audio_tokens or 0


def num_served(replica: Replica) -> float:
    """Requests that it has finished."""
    metrics = httpx.get(f"{replica.url}/metrics", trust_env=False).text
    lines = [line for line in metrics.splitlines() if line.startswith("vllm:request_success_total")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)
