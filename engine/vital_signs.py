"""Whether a process does anything, by Linux's account of it and its children. Torch-free.

What computes uses the processor, what would like to is runnable, and what waits for memory or files is in the
kernel's hands. What does none of these (stopped, frozen, waiting for a lock that nobody gives back) is not slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

BUSY = {"R", "D"}
"""Runnable; in a sleep that nothing interrupts."""
STATE, USER_TICKS, SYSTEM_TICKS = 0, 11, 12
"""Of the fields after the name in /proc/PID/task/TID/stat (proc_pid_stat(5))."""


class VitalSigns:
    """Of one process and all that descend from it."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._ticks = -1

    def have_stirred(self) -> bool:
        """Since the last call; true at the first, and where the system keeps no such account."""
        states, ticks = set(), 0
        for stat in _threads(self._pid):
            fields = stat.rpartition(")")[2].split()
            states.add(fields[STATE])
            ticks += int(fields[USER_TICKS]) + int(fields[SYSTEM_TICKS])
        before, self._ticks = self._ticks, ticks
        return not states or ticks != before or bool(states & BUSY)


def _threads(pid: int) -> Iterator[str]:
    """What `stat` says of each thread of a process and its descendants; nothing of those that have ended."""
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            yield (task / "stat").read_text()
            for child in (task / "children").read_text().split():
                yield from _threads(int(child))
    except OSError:
        return
