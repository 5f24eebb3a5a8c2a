"""The programs and commands of README and docs/: what is found, why some are not run, and how the rest is.

A page reads from its top: its shell blocks are one session, its Python blocks another. A comment in the line before
a block says what is special about it:

    <!-- not run: needs a GPU -->      one of the reasons below
    <!-- prints -->                    before a block of text: what the block before it prints, `…` for what varies
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "SECURITY.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")))
SHELL = ("sh", "bash", "console")
PYTHON = ("python",)
LANGUAGES = (*SHELL, *PYTHON, "js")
REASONS = frozenset(
    {
        "needs a GPU",
        "needs Docker",
        "needs a cluster",  # Kubernetes, Ray
        "needs a download",  # of packages or weights
        "needs a microphone",
        "takes minutes",
        "does not end",  # serves until it is stopped
        "is run by make clients",  # tests/clients runs it with the clients that it names
        "is another program's",  # shown beside ours: vLLM, transformers
    }
)
_BLOCK = re.compile(
    r"^(?P<indent> *)(?:<!-- (?P<note>[^\n]*?) -->\n(?P=indent))?"
    r"```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
DEFAULT = "http://127.0.0.1:8000"
"""The server's address unless it is told otherwise."""
_NOT_RUN = "not run: "
_RUNNER = """
import json, sys
scope = {"__name__": "__main__"}
for name, code in json.load(open(sys.argv.pop())):
    print(flush=True), print(name, flush=True)
    exec(compile(code, name, "exec"), scope)
    sys.stdout.flush()
"""


@dataclass(frozen=True, slots=True)
class Block:
    """One block of code."""

    page: str
    line: int
    language: str
    code: str
    reason: str | None = None
    """Why it is not run."""
    prints: str | None = None
    """What it is said to print."""

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str, text: str) -> list[Block]:
    """Blocks of code in a page's order."""
    found: list[Block] = []
    for match in _BLOCK.finditer(text):
        note, code = match["note"] or "", match["code"]
        code = re.sub(rf"^{match['indent']}", "", code, flags=re.MULTILINE)
        if note == "prints":
            last = found.pop()
            found.append(Block(last.page, last.line, last.language, last.code, last.reason, code))
        elif match["language"] in LANGUAGES:
            reason = note.removeprefix(_NOT_RUN) if note.startswith(_NOT_RUN) else None
            line = text.count("\n", 0, match.start("code"))
            found.append(Block(page, line, match["language"], code, reason))
    return found


def all_blocks() -> list[Block]:
    """Of all pages that there are."""
    files = [(page, ROOT / page) for page in PAGES]
    return [
        block for page, file in files if file.exists() for block in blocks_of(page, file.read_text(encoding="utf-8"))
    ]


def run_together(blocks: list[Block], ports: dict[str, str], folder: Path) -> dict[str, str]:
    """Run blocks of one page and language, one after the other, in a folder that looks like the repository.

    ports: addresses that pages name, and those that stand for them here. -> what each block printed, by its name.
    """
    for entry in ROOT.iterdir():
        (folder / entry.name).symlink_to(entry)
    programs = [(block.name, _with_ports(block.code, ports)) for block in blocks]
    if blocks[0].language in PYTHON:
        file = folder / "blocks.json"
        file.write_text(json.dumps(programs), encoding="utf-8")
        command = [sys.executable, "-c", _RUNNER, str(file)]
    else:
        lines = [f"printf '\\n%s\\n' '{name}'\n{code}" for name, code in programs]
        command = ["bash", "-euo", "pipefail", "-c", "\n".join(lines)]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("TYMPAN_")},
        "PATH": f"{_commands(folder)}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OPENAI_BASE_URL": f"{ports[DEFAULT]}/v1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    names = "|".join(re.escape(block.name) for block in blocks)
    pieces = re.split(rf"^({names})\n", done.stdout, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def _commands(folder: Path) -> Path:
    """A folder with `tympan`, which tests run without having installed it."""
    commands = folder / ".commands"
    commands.mkdir()
    (commands / "tympan").write_text(f'#!/bin/sh\nexec {sys.executable} -m tympan "$@"\n', encoding="utf-8")
    (commands / "tympan").chmod(0o755)
    return commands


def is_printed(said: str, printed: str) -> bool:
    """Whether a block printed what its page says, `…` standing for anything."""
    pattern = ".*".join(re.escape(piece) for piece in said.strip().split("…"))
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None


def _with_ports(code: str, ports: dict[str, str]) -> str:
    for written, actual in ports.items():
        code = code.replace(written, actual)
    return code
