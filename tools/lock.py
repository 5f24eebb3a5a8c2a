"""Write the lock files from pyproject.toml and the Makefile's torch: `make lock`, or `make lock ARGS=--upgrade`.

Without `--upgrade` what is locked stays as it is, and only what pyproject.toml has gained or lost changes. The files
hold for Python 3.11 to 3.13 on any platform; hashes are those of all files that the index has of a version.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from tools.locked import DEV, ROOT, RUNTIME, TOOLS, TORCH

HEADER = "# Written by `make lock` from pyproject.toml: change that, not this. tools/locked.py says what is where.\n"
UV = str(Path(sys.executable).with_name("uv"))
COMPILE = [
    UV,
    "pip",
    "compile",
    "--quiet",
    "--no-header",
    "--universal",
    "--python-version=3.11",
    "--generate-hashes",
]
CUDA = re.compile(r"torch$|triton$|nvidia-|cuda-")  # what torch needs on a GPU only

Blocks = list[tuple[str, str]]  # (name of a package, its lines)


def main(torch: str, options: list[str]) -> None:
    """`torch`: "torch==2.13.0". Dev keeps to what the runtime and torch are locked to; the tools live apart."""
    builders = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    extra = "\n".join([*builders, torch])
    serving = _resolve(["pyproject.toml", "-", "--extra", "otel"], [RUNTIME, TORCH], options, extra)
    _write(RUNTIME, [block for block in serving if not CUDA.match(block[0])])
    _write(TORCH, [block for block in serving if CUDA.match(block[0])])

    beside = ["--constraints", str(RUNTIME), "--constraints", str(TORCH)]
    testing = _resolve(["pyproject.toml", "--group", "dev", *beside], [DEV], options)
    here_already = {_head(text) for name, text in serving if name != "triton"}  # tested where torch has no CUDA, too
    _write(DEV, [(name, text) for name, text in testing if _head(text) not in here_already and name != "torch"])
    _write(TOOLS, _resolve(["--group", "tools"], [TOOLS], options))


def _resolve(sources: list[str], kept: list[Path], options: list[str], extra: str = "") -> Blocks:
    """What these need; versions stay those of `kept` where they can. `extra`: requirements for the source "-"."""
    with tempfile.NamedTemporaryFile("w+", suffix=".txt") as file:
        file.write("\n".join(path.read_text() for path in kept if path.exists()))
        file.flush()
        command = [*COMPILE, *sources, *options, "--output-file", file.name]
        subprocess.run(command, cwd=ROOT, input=extra.encode(), stdout=subprocess.DEVNULL, check=True)
        text = Path(file.name).read_text()
    blocks = re.split(r"^(?=[a-z0-9])", text.replace(f"{ROOT}/", ""), flags=re.MULTILINE)
    return [(block.split("==")[0], block) for block in blocks if block]


def _head(block: str) -> str:
    """The version and its marker: a package may be needed in more places by tests than by serving."""
    return block.partition(" \\\n")[0]


def _write(path: Path, blocks: Blocks) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(HEADER + "".join(block for _, block in blocks))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
