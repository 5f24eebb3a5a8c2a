"""Shared fixtures: two tiny random checkpoints made by transformers, and transformers itself on each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.reference import Reference, build

torch.set_num_threads(1)  # the models are tiny, and the machine is shared

# How long an example takes says more of the machine than of the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# A shell that starts the suite in the background ignores Ctrl-C for it, and so for every process that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """A run in Triton's interpreter has to be one from the start: triton asks when it is imported."""
    if config.getoption("markexpr") == "interpreter" and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("tests of kernels in the interpreter: TRITON_INTERPRET=1 pytest -m interpreter")


IN_THE_INTERPRETER = """
(
    nice -n 10 "$0" -m pytest -m interpreter -p no:cacheprovider --tb=short tests/model tests/engine
    echo $? > "$1/running" && mv "$1/running" "$1/status"
) > "$1/output" 2>&1 &
"""


@dataclass(frozen=True)
class InterpreterRun:
    """The tests marked `interpreter`, in a process that makes way for everybody else's.

    It is no child of this one: tests count their children.
    """

    folder: Path
    """For its exit status and what it prints."""
    group: int
    """Its process group."""

    @classmethod
    def start(cls, folder: Path) -> InterpreterRun:
        """folder: empty."""
        command = ["sh", "-c", IN_THE_INTERPRETER, sys.executable, str(folder)]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        root = Path(__file__).parent.parent
        with subprocess.Popen(command, cwd=root, env=environment, start_new_session=True) as shell:
            group = shell.pid
        return cls(folder, group)

    def result(self, timeout_s: float) -> tuple[int, str]:
        """Wait for its end. -> exit status, what it printed. Raises TimeoutError."""
        status, deadline = self.folder / "status", time.monotonic() + timeout_s
        while not status.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(self.output)
            time.sleep(0.2)
        return int(status.read_text()), self.output

    @property
    def output(self) -> str:
        """What it has printed."""
        return (self.folder / "output").read_text(errors="replace")

    def end(self) -> None:
        """Be it finished or not."""
        with suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)


@pytest.fixture(scope="session", autouse=True)
def interpreter_run(request: pytest.FixtureRequest) -> Iterator[InterpreterRun | None]:
    """Begun with the first test of all, where tests/test_kernels.py is among them; it waits for the end."""
    if not any(item.path.name == "test_kernels.py" for item in request.session.items):
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        run = InterpreterRun.start(Path(folder))
        yield run
        run.end()


@pytest.fixture(
    params=[pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def kernel_device(request: pytest.FixtureRequest) -> torch.device:
    """Where a test of a Triton kernel runs: in Triton's interpreter, or on a GPU. An ordinary run has neither.

    The interpreter multiplies bfloat16 wrongly without a word: on the CPU, tests use float32 and float16.
    """
    return torch.device(request.param)


@pytest.fixture(scope="session")
def gqa_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with 4 heads over 2 key-value heads."""
    return build(tmp_path_factory.mktemp("gqa"), kv_heads=2)


@pytest.fixture(scope="session")
def mha_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with as many key-value heads as heads, like the published ones."""
    return build(tmp_path_factory.mktemp("mha"), kv_heads=4, seed=1)


@pytest.fixture(scope="session")
def gqa_reference(gqa_folder: Path) -> Reference:
    """transformers on `gqa_folder`."""
    return Reference.load(gqa_folder)


@pytest.fixture(scope="session")
def mha_reference(mha_folder: Path) -> Reference:
    """transformers on `mha_folder`."""
    return Reference.load(mha_folder)
