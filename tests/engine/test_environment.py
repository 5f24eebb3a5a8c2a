"""What an engine process finds in its environment."""

from __future__ import annotations

import multiprocessing
import os

import pytest

from engine.cores import affine_cores
from engine.environment import CPU_ENGINE, engine_environment


def read(queue: multiprocessing.Queue[dict[str, str]]) -> None:
    queue.put(dict(os.environ))


def child_environment(device: str) -> dict[str, str]:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with engine_environment(device):
        process = context.Process(target=read, args=(queue,))
        process.start()
    found: dict[str, str] = queue.get(timeout=60)
    process.join(60)
    return found


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*CPU_ENGINE, "OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_an_engine_on_a_cpu_gets_them_and_this_process_does_not_keep_them(device: str) -> None:
    before = dict(os.environ)
    found = child_environment(device)
    assert {name: found.get(name) for name in CPU_ENGINE} == CPU_ENGINE
    assert dict(os.environ) == before


def test_a_cuda_engine_does_not() -> None:
    with engine_environment("cuda"):
        assert not CPU_ENGINE.keys() & os.environ.keys()


def test_what_the_operator_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    with engine_environment("cpu"):
        assert os.environ["MALLOC_TOP_PAD_"] == "1"
        assert "GOMP_SPINCOUNT" not in os.environ
    assert os.environ["MALLOC_TOP_PAD_"] == "1"


def test_threads_are_as_few_as_a_limit_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a limit OpenMP counts the cores: it knows which are the two halves of one."""
    for cores, wanted in ((affine_cores(), None), (affine_cores() - 1, str(affine_cores() - 1))):
        monkeypatch.setattr("engine.environment.usable_cores", lambda cores=cores: cores)
        with engine_environment("cpu"):
            assert os.environ.get("OMP_NUM_THREADS") == wanted
        with engine_environment("cuda"):
            assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with engine_environment("cpu"):
        assert os.environ["OMP_NUM_THREADS"] == "7"
