"""Shared fixtures: two tiny random checkpoints made by transformers, and transformers itself on each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
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


@dataclass(frozen=True)
class InterpreterRun:
    """The tests marked `interpreter`, in a process of their own that makes way for everybody else's."""

    process: subprocess.Popen[bytes]
    output: Path

    @classmethod
    def start(cls, output: Path) -> InterpreterRun:
        """output: a file for what it prints."""
        command = ["nice", "-n", "10", sys.executable, "-m", "pytest", "-m", "interpreter", "-p", "no:cacheprovider",
                   "--tb=short", "tests/model", "tests/engine"]  # fmt: skip
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        with output.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=Path(__file__).parent.parent, env=environment, stdout=file, stderr=subprocess.STDOUT
            )
        return cls(process, output)

    def result(self, timeout_s: float) -> tuple[int, str]:
        """Wait for its end. -> exit status, what it printed."""
        return self.process.wait(timeout_s), self.output.read_text(errors="replace")


@pytest.fixture(scope="session", autouse=True)
def interpreter_run(request: pytest.FixtureRequest) -> Iterator[InterpreterRun | None]:
    """Begun with the first test of all, where tests/test_kernels.py is among them; it waits for the end."""
    if not any(item.path.name == "test_kernels.py" for item in request.session.items):
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        run = InterpreterRun.start(Path(folder) / "output")
        yield run
        run.process.kill()
        run.process.wait()


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
