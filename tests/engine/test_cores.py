"""How many cores there are for us, by files as Linux has them in and around containers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.cores import affine_cores, usable_cores


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


def machine(root: Path, groups: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max", 8), ("150000", 1), ("200000", 2), ("10000", 1), ("390000", 3), ("6400000", 8), ("nonsense", 8)],
)
def test_a_limit_of_a_container(tmp_path: Path, quota: str, cores: int) -> None:
    """Version 2, with a name space of its own."""
    assert usable_cores(machine(tmp_path, "0::/", {"sys/fs/cgroup/cpu.max": f"{quota} 100000"})) == cores


def test_the_tightest_of_the_groups_around_it_counts(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/machine/cpu.max": "350000 100000",
        "sys/fs/cgroup/machine/pod/cpu.max": "max 100000",
        "sys/fs/cgroup/machine/pod/server/cpu.max": "500000 100000",
        "sys/fs/cgroup/machine/other/cpu.max": "100000 100000",
    }
    assert usable_cores(machine(tmp_path, "0::/machine/pod/server", files)) == 3


@pytest.mark.parametrize("folder", ["", "docker/0123/"])
def test_version_1_and_a_name_that_is_seen_from_outside_only(tmp_path: Path, folder: str) -> None:
    files = {
        f"sys/fs/cgroup/cpu/{folder}cpu.cfs_quota_us": "250000",
        f"sys/fs/cgroup/cpu/{folder}cpu.cfs_period_us": "100000",
    }
    groups = "5:memory:/docker/0123\n4:cpu,cpuacct:/docker/0123\n1:name=systemd:/"
    assert usable_cores(machine(tmp_path, groups, files)) == 2
    files[f"sys/fs/cgroup/cpu/{folder}cpu.cfs_quota_us"] = "-1"
    assert usable_cores(machine(tmp_path, groups, files)) == 8


def test_without_groups_the_affinity_counts(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == affine_cores() == 8
