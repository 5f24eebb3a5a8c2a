"""The lock files hold what pyproject.toml asks for, all that this needs in turn, and no more; with hashes."""

from __future__ import annotations

import importlib.metadata
import tomllib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.locked import DEV, ROOT, RUNTIME, TOOLS, TORCH, Locked, read

FILES = pytest.mark.parametrize("path", [RUNTIME, TORCH, DEV, TOOLS], ids=lambda path: path.stem)
RELOCK = "run `make lock`"


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def group(name: str) -> list[str]:
    """The requirements of a dependency group and of those that it includes."""
    members = project()["dependency-groups"][name]
    included = [group(member["include-group"]) for member in members if isinstance(member, dict)]
    return [member for member in members if isinstance(member, str)] + [one for list_ in included for one in list_]


@cache
def here(path: Path) -> dict[str, Locked]:
    """What a file has for this Python on this machine."""
    return {package.name: package for package in read(path) if package.is_here}


def reached(wanted: Iterable[str], known: dict[str, Locked]) -> set[str]:
    """Names of what requirements need in turn, as the installed packages say. Their locked versions fit."""
    names: set[str] = set()
    seen: set[str] = set()
    waiting = [(Requirement(text), "") for text in wanted]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if name in here(TORCH) and name not in known:
            continue
        assert name == "torch" or name in known, f"{requirement} is not locked: {RELOCK}"
        assert requirement.specifier.contains(known[name].version, prereleases=True), f"{requirement}: {RELOCK}"
        names.add(name)
        for extra in {"", *requirement.extras}:
            if f"{name}[{extra}]" not in seen:
                seen.add(f"{name}[{extra}]")
                needs = importlib.metadata.requires(name) or []
                waiting += [(Requirement(text), extra) for text in needs]
    return names


def runtime_requirements() -> list[str]:
    facts = project()
    builders = facts["build-system"]["requires"]
    return facts["project"]["dependencies"] + facts["project"]["optional-dependencies"]["otel"] + builders


@FILES
def test_every_file_of_every_package_has_a_hash(path: Path) -> None:
    packages = read(path)
    assert packages
    for package in packages:
        assert package.hashes, package.name
        assert all(len(hash) == len("sha256:") + 64 and hash.startswith("sha256:") for hash in package.hashes)


@FILES
def test_where_packages_come_from_is_the_installing_machines_business(path: Path) -> None:
    assert not {"--index-url", "--extra-index-url", "--find-links", "://"} & set(path.read_text().split())
    assert "://" not in path.read_text()


def test_the_runtime_lock_is_what_serving_needs() -> None:
    known = here(RUNTIME) | here(TORCH)
    needed = reached(runtime_requirements(), known)
    assert needed - here(TORCH).keys() == here(RUNTIME).keys(), RELOCK


def test_the_dev_lock_is_what_the_dev_group_needs_beside_it() -> None:
    known = here(TORCH) | here(RUNTIME) | here(DEV)
    needed = reached(group("dev"), known)
    assert needed - here(RUNTIME).keys() - {"torch"} <= here(DEV).keys() <= needed, RELOCK


def test_no_package_is_locked_to_two_versions() -> None:
    known = here(RUNTIME) | here(TORCH)
    for name, package in here(DEV).items():
        assert name not in known or known[name].version == package.version
    assert not here(RUNTIME).keys() & here(TORCH).keys()


def test_the_tools_lock_has_each_of_the_tools() -> None:
    known = here(TOOLS)
    for requirement in map(Requirement, group("tools")):
        locked = known[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(locked.version), f"{requirement}: {RELOCK}"


def test_torch_is_the_same_wherever_it_is_named() -> None:
    version = here(TORCH)["torch"].version
    assert f"TORCH ?= torch=={version}\n" in (ROOT / "Makefile").read_text()


def test_serving_needs_no_cuda_from_the_lock() -> None:
    assert not [name for name in here(RUNTIME) if name.startswith(("nvidia-", "cuda-", "torch", "triton"))]


@pytest.mark.parametrize("line", ["numpy>=2 --hash=sha256:0", "numpy==2.*,!=2.1", "numpy"])
def test_what_is_not_pinned_is_no_lock(line: str, tmp_path: Path) -> None:
    (tmp_path / "lock.txt").write_text(line)
    with pytest.raises(ValueError, match="not pinned"):
        read(tmp_path / "lock.txt")
