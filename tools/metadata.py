"""What the locked packages say of themselves, asked of the index by pip without fetching a package."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.locked import RUNTIME, TORCH, Locked, read

PIP = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]


@dataclass(frozen=True)
class Metadata:
    """Of one version of a package."""

    summary: str
    licence_expression: str  # SPDX, or ""
    licence_text: str  # what older packages have: a name, or the whole text
    classifiers: tuple[str, ...]
    requires: frozenset[str]  # canonical names of what it needs here, extras aside


def shipped() -> list[Locked]:
    """What an image for CUDA has on this kind of machine, by name."""
    return sorted((one for path in (RUNTIME, TORCH) for one in read(path) if one.is_here), key=lambda one: one.name)


def ask(packages: Iterable[Locked]) -> dict[str, Metadata]:
    """By canonical name. RuntimeError with pip's words where it cannot tell."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(f"{one.name}=={one.version}\n" for one in packages)
        file.flush()
        command = [*PIP, "--report", "-", "--requirement", file.name]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError(answer.stderr)
    return dict(_metadata(entry["metadata"]) for entry in json.loads(answer.stdout)["install"])


def _metadata(fields: dict[str, object]) -> tuple[str, Metadata]:
    def texts(name: str) -> tuple[str, ...]:
        values = fields.get(name) or ()
        assert isinstance(values, list | tuple)
        return tuple(map(str, values))

    needs = [Requirement(text) for text in texts("requires_dist")]
    here = {canonicalize_name(one.name) for one in needs if one.marker is None or one.marker.evaluate({"extra": ""})}
    return canonicalize_name(str(fields["name"])), Metadata(
        summary=str(fields.get("summary") or ""),
        licence_expression=str(fields.get("license_expression") or ""),
        licence_text=str(fields.get("license") or ""),
        classifiers=texts("classifier"),
        requires=frozenset(here),
    )
