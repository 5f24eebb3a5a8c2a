"""Processes that compute, sleep and are stopped, as Linux tells of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from engine.vital_signs import VitalSigns

COMPUTES = "while True: pass"
SLEEPS = "import time; time.sleep(1000)"
CHILD_COMPUTES = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {COMPUTES!r}])"


@contextmanager
def process(program: str) -> Iterator[int]:
    """In a group of its own, all of which ends."""
    running = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    try:
        yield running.pid
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()


def looks(signs: VitalSigns, seconds: float = 0.6) -> list[bool]:
    found = []
    for _ in range(4):
        time.sleep(seconds / 4)
        found.append(signs.have_stirred())
    return found


@pytest.mark.parametrize("program", [COMPUTES, CHILD_COMPUTES])
def test_what_computes_stirs_until_it_is_stopped(program: str) -> None:
    with process(program) as pid:
        time.sleep(0.4)
        signs = VitalSigns(pid)
        assert signs.have_stirred()
        assert all(looks(signs))
        os.killpg(pid, signal.SIGSTOP)
        looks(signs, 0.2)
        assert not any(looks(signs))
        os.killpg(pid, signal.SIGCONT)
        assert all(looks(signs))


def test_what_sleeps_does_not_stir() -> None:
    with process(SLEEPS) as pid:
        time.sleep(0.4)
        signs = VitalSigns(pid)
        assert signs.have_stirred()
        assert not any(looks(signs))


def test_of_what_is_not_there_nothing_is_known() -> None:
    with process(SLEEPS) as pid:
        pass
    assert all(looks(VitalSigns(pid), 0.0))
