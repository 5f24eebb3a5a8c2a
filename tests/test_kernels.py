"""Triton kernels without a GPU: every test marked `interpreter` runs in a pytest process of its own.

Triton decides when it is imported whether kernels are compiled or interpreted, so one process has either kind. A
test takes the fixture `kernel_device` (tests/conftest.py) and runs here in the interpreter, and on a GPU machine
by `pytest -m gpu`, without change. By hand: `TRITON_INTERPRET=1 pytest -m interpreter tests/model -k decode`.
It takes a minute: `interpreter_run` (tests/conftest.py) begins it with the first test of all, beside them.
"""

from __future__ import annotations

import platform
import sys
from importlib.util import find_spec

import pytest

from tests.conftest import InterpreterRun


@pytest.mark.skipif(
    find_spec("triton") is None and (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="triton has no wheel for this platform",
)
@pytest.mark.timeout(1200)
def test_the_kernels_in_tritons_interpreter(interpreter_run: InterpreterRun) -> None:
    status, told = interpreter_run.result(1190)
    assert status == 0, told[-25_000:]
    assert " passed" in told
