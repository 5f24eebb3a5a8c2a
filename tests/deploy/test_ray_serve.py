"""Two replicas on Ray Serve by deploy/ray_serve.py: loaded, one killed, one drained. Ray: `make topology`."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.deploy.conftest import ROOT, client_of, free_port
from tests.deploy.load import SAID, ask, ask_streaming, question, under_load

pytestmark = pytest.mark.topology

PYTHON = ROOT / ".topology/bin/python"


class Cluster:
    """The process of tests/deploy/ray_cluster.py."""

    def __init__(self, log: Path) -> None:
        if not PYTHON.exists():
            pytest.fail("run `make topology`, which installs Ray")
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        paths = os.pathsep.join((str(ROOT), sysconfig.get_path("purelib")))  # Tympan and what it needs are not Ray's
        environment = os.environ | {"PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0"}
        self._process = subprocess.Popen(
            [PYTHON, "-m", "tests.deploy.ray_cluster", str(port)],
            cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"),
        )  # fmt: skip
        self.pid = self._process.pid
        self._wait_for("ready")

    def order(self, order: str) -> None:
        """And wait until it has been carried out."""
        assert self._process.stdin is not None
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()
        self._wait_for("done")

    def _wait_for(self, word: str) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() == word:
                return
        raise AssertionError("the cluster has ended")

    def close(self) -> None:
        self._process.communicate(timeout=120)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Ready."""
    cluster = Cluster(tmp_path_factory.mktemp("ray") / "log")
    yield cluster
    cluster.close()


def test_answers_come_through_whole_in_pieces_and_refused(cluster: Cluster) -> None:
    client = client_of(cluster.url)
    assert SAID in ask(client)
    assert SAID in ask_streaming(client)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**question() | {"temperature": 9})
    assert caught.value.param == "temperature"


def test_a_killed_replica_is_replaced(cluster: Cluster) -> None:
    """Ray's proxy does not ask another replica: what the killed one had is lost, and nothing else."""
    with under_load(client_of(cluster.url)) as tally:
        time.sleep(3)
        cluster.order("kill")
        time.sleep(5)
    assert len(tally.lost_whole) + len(tally.lost_streams) <= 8
    assert tally.num_answers > 20


def test_a_drained_replica_loses_nothing(cluster: Cluster) -> None:
    with under_load(client_of(cluster.url)) as tally:
        time.sleep(2)
        cluster.order("1")
        time.sleep(3)
    assert tally.lost_whole == tally.lost_streams == []
    assert tally.num_answers > 10
