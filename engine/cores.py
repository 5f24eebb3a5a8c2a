"""How many cores this process may keep busy: its affinity, and the CPU limit of its container. Torch-free.

A container's limit is a quota of its control group (version 1 or 2), which no count of processors shows. Whoever
runs more threads than it allows stands still for the rest of each tenth of a second, with all else in the container.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def usable_cores(root: Path = ROOT) -> int:
    """At least 1. Part of a core counts for nothing: it is left to whatever else runs. root: of the file system."""
    return max(1, math.floor(min([affine_cores(), *_quotas(root)])))


def affine_cores() -> int:
    """That this process may run on, whatever its quota."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _quotas(root: Path) -> Iterator[float]:
    """Cores, by each control group that this process is in and that has a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            group = PurePosixPath(name.lstrip("/"))
            for one in (group, *group.parents):  # a container sees its own group as the topmost, or under its name
                yield from _quota(mount / one)


def _quota(group: Path) -> Iterator[float]:
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((group / name).read_text(encoding="utf-8") for name in names).split()
            if float(quota) > 0:
                yield float(quota) / float(period)
        except (OSError, ValueError):  # not there, or "max"
            continue
