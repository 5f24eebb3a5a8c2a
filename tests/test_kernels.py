"""Triton kernels without a GPU: every test marked `interpreter` runs in a pytest process of its own.

Triton decides when it is imported whether kernels are compiled or interpreted, so one process has either kind. A
test takes the fixture `kernel_device` (tests/conftest.py) and runs here in the interpreter, and on a GPU machine
by `pytest -m gpu`, without change. By hand: `TRITON_INTERPRET=1 pytest -m interpreter tests/model -k decode`.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDERS = ("tests/model", "tests/engine")
"""Where tests of kernels are."""


@pytest.mark.skipif(
    find_spec("triton") is None and (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="triton has no wheel for this platform",
)
@pytest.mark.timeout(600)
def test_the_kernels_in_tritons_interpreter() -> None:
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-m", "interpreter", "-p", "no:cacheprovider", "--tb=short", *FOLDERS]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    assert " passed" in done.stdout
