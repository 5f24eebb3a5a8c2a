"""The programs and commands of README and docs/: what is found, and how each kind is run.

A page reads from its top: its shell blocks are one session, its Python blocks another. A comment in the line before
a block says what is special about it:

    <!-- serves -->        one of WAYS below
    <!-- prints -->        before a block of text: what the block before it prints, `…` for what varies

Every block is of a language below and of one of WAYS: there is none that says "not run".
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
PAGES = ("README.md", "SECURITY.md", "CONTRIBUTING.md", "benchmarks/README.md", *(
    f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md"))
))  # fmt: skip
SHELL = ("sh", "bash", "console")
PYTHON = ("python",)
LANGUAGES = (*SHELL, *PYTHON, "js")
DATA = ("text", "json")
"""What is shown, not run."""
WAYS = {
    "": "as pasted, the blocks of a page and language in order, against one server",
    "serves": "until it is ready and its page is there; then it is ended",
    "serves on a GPU": "the same on a GPU; without one it says in one sentence what is missing",
    "needs a GPU": "each line, without a GPU, says what is missing; `make gpu` is what runs them on one",
    "run by make clients": "by tests/clients, with the clients that the page names",
    "run by tests/deploy/test_roll.py": "as pasted, replicas and router standing in for those that it names",
}
"""How a block is run, by the comment before it."""
DEFAULT = "http://127.0.0.1:8000"
"""The server's address unless it is told otherwise."""
REAL_MODEL = "Qwen/Qwen2-Audio-7B-Instruct"
STAND_IN = ROOT / "checkpoints" / "tympan-tiny"
"""What commands that name the real model find in the hub's cache here."""
OF_AN_OUTER_RUN = ("TYMPAN_", "MAKE", "MFLAGS", "ARGS")
"""Variables that a command of a page would not find in a reader's terminal; `make test ARGS=…` sets some."""
_BLOCK = re.compile(
    r"^(?P<indent> *)(?:<!-- (?P<note>[^\n]*?) -->\n(?P=indent))?"
    r"```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_FENCE = re.compile(r"^[ >]*(?:```|~~~)", re.MULTILINE)
_RUNNER = """
import json, sys
scope = {"__name__": "__main__"}
for name, code in json.load(open(sys.argv.pop())):
    print(flush=True), print(name, flush=True)
    exec(compile(code, name, "exec"), scope)
    sys.stdout.flush()
"""


class PageError(Exception):
    """A page has a block that nobody would run or look at."""


@dataclass(frozen=True, slots=True)
class Block:
    """One block of code."""

    page: str
    line: int
    language: str
    code: str
    way: str = ""
    """One of WAYS."""
    prints: str | None = None
    """What it is said to print."""

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> str:
        """Of a shell block: without comments and the space before them."""
        return re.sub(r"(?:^|\s+)#[^\n'\"]*$", "", self.code, flags=re.MULTILINE).strip()


def blocks_of(page: str, text: str) -> list[Block]:
    """Blocks of code in a page's order. Raises PageError for one that is neither run nor data."""
    found: list[Block] = []
    num_fences = 0
    for match in _BLOCK.finditer(text):
        num_fences += 2
        note, language = match["note"] or "", match["language"]
        line = text.count("\n", 0, match.start("code"))
        code = re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
        if note == "prints":
            last = found.pop()
            if last.way or last.prints is not None or language != "text":
                raise PageError(f"{page}:{line}: it is compared with what {last.name} prints, which cannot be")
            found.append(Block(last.page, last.line, last.language, last.code, prints=code))
        elif language in LANGUAGES and note in WAYS:
            found.append(Block(page, line, language, code, note))
        elif language not in DATA:
            raise PageError(f"{page}:{line}: nobody runs a block of {language or 'no language'} with {note!r}")
    if num_fences != len(_FENCE.findall(text)):
        raise PageError(f"{page}: a fence is not closed, or of another kind than the others")
    return found


def all_blocks(way: str | None = None) -> list[Block]:
    """Of all pages; those that are run in one way."""
    blocks = [block for page in PAGES for block in blocks_of(page, (ROOT / page).read_text(encoding="utf-8"))]
    return [block for block in blocks if way in (None, block.way)]


def data_blocks(language: str) -> list[tuple[str, str]]:
    """Page and text of what is shown in a language of DATA."""
    return [
        (page, match["code"])
        for page in PAGES
        for match in _BLOCK.finditer((ROOT / page).read_text(encoding="utf-8"))
        if match["language"] == language
    ]


def run_together(blocks: list[Block], written: dict[str, str], folder: Path) -> dict[str, str]:
    """Run blocks of one page and language, one after the other, in a folder that looks like the repository.

    written: addresses that pages name, and those that stand for them here. -> what each block printed, by its name.
    """
    environment = look_like_the_repository(folder)
    environment["OPENAI_BASE_URL"] = f"{written[DEFAULT]}/v1"
    programs = [(block.name, replaced(block.code, written)) for block in blocks]
    if blocks[0].language in PYTHON:
        file = folder / "blocks.json"
        file.write_text(json.dumps(programs), encoding="utf-8")
        command = [sys.executable, "-c", _RUNNER, str(file)]
    else:
        lines = [f"printf '\\n%s\\n' '{name}'\n{code}" for name, code in programs]
        command = ["bash", "-euo", "pipefail", "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    names = "|".join(re.escape(block.name) for block in blocks)
    pieces = re.split(rf"^({names})\n", done.stdout, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def look_like_the_repository(folder: Path) -> dict[str, str]:
    """Fill a folder with the repository's files, an environment as `make setup` leaves it, and the real model's
    stand-in. -> the environment variables that its commands need."""
    for entry in ROOT.iterdir():
        if entry.name != ".venv":
            (folder / entry.name).symlink_to(entry)
    commands = folder / ".venv" / "bin"
    commands.mkdir(parents=True)
    for name, module in (("python", ""), ("tympan", " -m tympan")):
        (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable}{module} "$@"\n', encoding="utf-8")
        (commands / name).chmod(0o755)
    for stamp in (".runtime", ".dev"):
        (folder / ".venv" / stamp).touch()
    commit = "0" * 40
    cached = folder / ".hub" / f"models--{REAL_MODEL.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit, encoding="ascii")
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / commit).symlink_to(STAND_IN)
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(OF_AN_OUTER_RUN)},
        "PATH": f"{commands}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_CACHE": str(folder / ".hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def is_printed(said: str, printed: str) -> bool:
    """Whether a block printed what its page says, `…` standing for anything."""
    pattern = ".*".join(re.escape(piece) for piece in said.strip().split("…"))
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None


def replaced(code: str, written: dict[str, str]) -> str:
    """Code with other addresses than those that are written."""
    for name, actual in written.items():
        code = code.replace(name, actual)
    return code
