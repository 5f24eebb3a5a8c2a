"""The lock files: which packages, which versions, which files of them.

`runtime.txt` is all that serving needs but torch, with `setuptools`, which builds the project. `torch.txt` is torch
for CUDA with the libraries that it brings, for the image; elsewhere which build is right is the machine's business.
`dev.txt` is what tests, lint and types need beside `runtime.txt`; `tools.txt` is what this folder's modules run on,
in an environment of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "requirements"
RUNTIME, TORCH, DEV, TOOLS = (FOLDER / f"{name}.txt" for name in ("runtime", "torch", "dev", "tools"))


@dataclass(frozen=True)
class Locked:
    """A version of a package, where its marker holds."""

    name: str  # canonical
    version: str
    marker: str  # "" everywhere
    hashes: tuple[str, ...]  # "sha256:..." of each file that may be installed

    @property
    def is_here(self) -> bool:
        """Whether this Python on this machine would install it."""
        marker = Requirement(f"{self.name}; {self.marker}").marker if self.marker else None
        return marker is None or marker.evaluate()


def read(path: Path) -> list[Locked]:
    """In the file's order. ValueError for a line that pins no exact version."""
    text = path.read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    return [_package(line) for line in lines]


def _package(line: str) -> Locked:
    wanted, *hashes = line.split("--hash=")
    requirement = Requirement(wanted.strip())
    pins = [specifier.version for specifier in requirement.specifier if specifier.operator == "=="]
    if len(pins) != 1 or len(requirement.specifier) != 1:
        raise ValueError(f"not pinned to one version: {wanted}")
    marker = str(requirement.marker) if requirement.marker else ""
    return Locked(canonicalize_name(requirement.name), pins[0], marker, tuple(hash.strip() for hash in hashes))
