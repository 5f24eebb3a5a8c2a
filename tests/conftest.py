"""Shared fixtures: two tiny random checkpoints made by transformers, and transformers itself on each."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from tests.reference import Reference, build

torch.set_num_threads(1)  # the models are tiny, and the machine is shared

# A shell that starts the suite in the background ignores Ctrl-C for it, and so for every process that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """A run in Triton's interpreter has to be one from the start: triton asks when it is imported."""
    if config.getoption("markexpr") == "interpreter" and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("tests of kernels in the interpreter: TRITON_INTERPRET=1 pytest -m interpreter")


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
