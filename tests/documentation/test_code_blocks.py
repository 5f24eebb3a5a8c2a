"""Every block of code in README and docs/ runs as pasted, or says why it cannot run here, and is no nonsense."""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from configs.settings import Settings
from tests.integration.conftest import start_server

from .code_blocks import (
    DEFAULT,
    PYTHON,
    REASONS,
    ROOT,
    SHELL,
    Block,
    all_blocks,
    blocks_of,
    is_printed,
    run_together,
)

BLOCKS = all_blocks()
RUN = [block for block in BLOCKS if block.reason is None]
SESSIONS = sorted({(block.page, block.language in PYTHON) for block in RUN})
SPEECH = ROOT / "tests" / "fixtures" / "speech"
SWITCHES = {"no-" + name.replace("_", "-") for name in Settings.model_fields}
FLAGS = {"config", "help", *(name.replace("_", "-") for name in Settings.model_fields)} | SWITCHES
Printed = dict[tuple[str, bool], Future[dict[str, str]]]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Printed]:
    """All pages at once, a few at a time, against one server, beside which the clips are served on "port 9000"."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(SPEECH))
    clips = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=clips.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{clips.server_port}"
    server = start_server("--allowed-private-media-hosts", address)
    ports = {DEFAULT: server.url, "127.0.0.1:9000": address}
    with ThreadPoolExecutor(3) as pool:
        yield {
            session: pool.submit(run_together, _blocks_of(session), ports, tmp_path_factory.mktemp("pasted"))
            for session in SESSIONS
        }
    server.stop()
    clips.shutdown()
    clips.server_close()


def _blocks_of(session: tuple[str, bool]) -> list[Block]:
    return [block for block in RUN if (block.page, block.language in PYTHON) == session]


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: f"{session[0]}-{'python' if session[1] else 'sh'}")
def test_blocks_run_as_pasted(session: tuple[str, bool], printed: Printed) -> None:
    outputs = printed[session].result()
    for block in _blocks_of(session):
        if block.prints is not None:
            assert is_printed(block.prints, outputs[block.name]), f"{block.name} printed {outputs[block.name]!r}"


def test_what_is_not_run_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    unknown = [f"{block.name}: {block.reason}" for block in BLOCKS if block.reason not in {None, *REASONS}]
    assert not unknown, f"the reasons are a closed list: {sorted(REASONS)}"
    assert not [block.name for block in RUN if block.language not in (*SHELL, *PYTHON)]
    counts = Counter(block.reason or "run" for block in BLOCKS)
    with capsys.disabled():
        print("\ncode blocks:", ", ".join(f"{count} {what}" for what, count in counts.most_common()))  # noqa: T201
    assert counts["run"] >= len(BLOCKS) / 3


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.reason and block.language != "js"], ids=lambda block: block.name
)
def test_what_is_not_run_is_no_nonsense(block: Block) -> None:
    """It parses, and the targets, modules, files and flags of ours that it names exist."""
    if block.language in PYTHON:
        compile(block.code, block.name, "exec")
        return
    subprocess.run(["bash", "-n", "-c", block.code], check=True)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for line in block.code.replace("\\\n", " ").splitlines():
        command = line.split(" #")[0]
        assert set(re.findall(r"^make ([a-z]+)", command)) <= targets, line
        for module in re.findall(r"python -m ([\w.]+)", command):
            if (ROOT / module.split(".")[0]).is_dir():
                assert importlib.util.find_spec(module) is not None, line
        for file in re.findall(r"(?:configs|deploy|tests|benchmarks|checkpoints)/[\w./-]+\.\w+", command):
            assert (ROOT / file).exists() or "-o" in command or ">" in command, line
        if re.match(r"make serve|python -m server|tympan serve", command):
            assert set(re.findall(r"--([a-z][a-z-]+)", command)) <= FLAGS, line


def test_how_pages_are_read() -> None:
    page = (
        "# A\n```sh\necho 1 x\n```\nIt says:\n\n<!-- prints -->\n```text\n1 …\n```\n\n"
        "<!-- not run: needs a GPU -->\n```python\nprint(2)\n```\n1. in a list\n\n"
        "   ```python\n   if 1:\n       print(3)\n   ```\n```json\n{}\n```\n"
    )
    first, second, third = blocks_of("a.md", page)
    assert first == Block("a.md", 2, "sh", "echo 1 x\n", None, "1 …\n")
    assert (second.language, second.reason, second.code) == ("python", "needs a GPU", "print(2)\n")
    assert third.code == "if 1:\n    print(3)\n"
    assert is_printed("1 …\n", "1 x\n")
    assert not is_printed("1 …", "2 x")
