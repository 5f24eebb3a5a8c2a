"""Every block of code in README and docs/ is run, in one of the ways of code_blocks.WAYS, and every command within a
sentence names what there is.

A block of another kind fails while pages are read, so that none can be left out.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import threading
import tomllib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import torch
import yaml

from configs.settings import Settings
from tests.clients.test_clients import PROGRAMS
from tests.integration.conftest import ADDRESS, start_server

from .code_blocks import (
    DEFAULT,
    PAGES,
    PYTHON,
    ROOT,
    SHELL,
    WAYS,
    Block,
    PageError,
    all_blocks,
    blocks_of,
    data_blocks,
    is_printed,
    look_like_the_repository,
    replaced,
    run_together,
)

BLOCKS = all_blocks()
PASTED = all_blocks("")
SESSIONS = sorted({(block.page, block.language in PYTHON) for block in PASTED})
SERVING = list({block.commands: block for block in all_blocks("serves")}.values())
"""The same command on several pages is run once."""
SPEECH = ROOT / "tests" / "fixtures" / "speech"
TRAINING = "checkpoints/training/README.md"
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
SWITCHES = {"no-" + name.replace("_", "-") for name in Settings.model_fields}
FLAGS = {"config", "help", *(name.replace("_", "-") for name in Settings.model_fields)} | SWITCHES
NO_GPU = "torch sees no CUDA device here; "
END_SECONDS = 30
Printed = dict[tuple[str, bool], Future[dict[str, str]]]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Printed]:
    """All pages at once, a few at a time, against one server, beside which the clips are served on "port 9000"."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(SPEECH))
    clips = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=clips.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{clips.server_port}"
    server = start_server("--allowed-private-media-hosts", address)
    written = {DEFAULT: server.url, "http://gpu-box:8000": server.url, "127.0.0.1:9000": address}
    with ThreadPoolExecutor(3) as pool:
        yield {
            session: pool.submit(run_together, _blocks_of(session), written, tmp_path_factory.mktemp("pasted"))
            for session in SESSIONS
        }
    server.stop()
    clips.shutdown()
    clips.server_close()


def _blocks_of(session: tuple[str, bool]) -> list[Block]:
    return [block for block in PASTED if (block.page, block.language in PYTHON) == session]


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: f"{session[0]}-{'python' if session[1] else 'sh'}")
def test_blocks_run_as_pasted(session: tuple[str, bool], printed: Printed) -> None:
    outputs = printed[session].result()
    for block in _blocks_of(session):
        assert block.language in (*SHELL, *PYTHON), block.name
        if block.prints is not None:
            assert is_printed(block.prints, outputs[block.name]), f"{block.name} printed {outputs[block.name]!r}"


@pytest.mark.parametrize("block", SERVING, ids=lambda block: block.name)
def test_what_serves_is_ready_shows_its_page_and_ends(block: Block, tmp_path: Path) -> None:
    _serve(block, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("block", all_blocks("serves on a GPU"), ids=lambda block: block.name)
def test_what_serves_on_a_gpu(block: Block, tmp_path: Path) -> None:
    _serve(block, tmp_path)


def _serve(block: Block, folder: Path) -> None:
    """Start a block in a terminal of its own, ask what it serves, and end all that runs in the terminal."""
    assert block.language in SHELL
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    written = {" 9000 ": f" {port} ", "127.0.0.1:9000": f"127.0.0.1:{port}", "0.0.0.0": "127.0.0.1"}
    terminal = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", replaced(block.code, written)],
        cwd=folder,
        env=look_like_the_repository(folder) | {"TYMPAN_PORT": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert terminal.stdout is not None
    lines: list[str] = []
    try:
        for line in terminal.stdout:
            lines.append(line)
            if line.startswith("Tympan serves"):
                break
        found = ADDRESS.search(lines[-1]) if lines else None
        assert found is not None, "".join(lines)
        assert httpx.get(f"{found.group()}/ready").status_code == 200
        assert "<title>Tympan" in httpx.get(found.group()).text
        if str(port) in replaced(block.code, written):
            assert httpx.get(f"http://127.0.0.1:{port}/sound_bell.wav").content[:4] == b"RIFF"
    finally:
        os.killpg(terminal.pid, signal.SIGTERM)
        rest, _ = terminal.communicate(timeout=END_SECONDS)
    assert "Traceback" not in "".join(lines) + rest
    with pytest.raises(httpx.ConnectError):
        httpx.get(found.group())


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what is said without a GPU")
@pytest.mark.parametrize(
    "block", all_blocks("needs a GPU") + all_blocks("serves on a GPU"), ids=lambda block: block.name
)
def test_what_needs_a_gpu_says_so_without_one(block: Block, tmp_path: Path) -> None:
    """At once, so that the lines of a block can be tried beside each other."""
    environment = look_like_the_repository(tmp_path)

    def check(command: str) -> None:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command.replace("0.0.0.0", "127.0.0.1")],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode in (1, 2), command
        assert NO_GPU in done.stderr, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr

    with ThreadPoolExecutor() as pool:
        list(pool.map(check, [block.code] if block.way == "serves on a GPU" else block.commands.splitlines()))


def test_the_programs_for_clients_are_those_that_make_clients_runs() -> None:
    """By name too: tests/clients compares it with what it runs."""
    assert [block.code for block in all_blocks("run by make clients")] == list(PROGRAMS.values())
    assert "clients" in re.findall(r"^check: (.*?) ##", MAKEFILE, re.MULTILINE)[0].split()


def test_which_block_is_run_how(capsys: pytest.CaptureFixture[str]) -> None:
    counts = Counter(block.way for block in BLOCKS)
    assert set(counts) == set(WAYS), "a way that no block takes"
    with capsys.disabled():
        lines = [f"{count:4} {WAYS[way]}" for way, count in counts.most_common()]
        print(f"\n{len(BLOCKS)} code blocks are run:", *lines, sep="\n")  # noqa: T201


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<!-- not run: takes minutes -->\n```sh\nmake peers\n```\n", "a.md:2: nobody runs a block of sh"),
        ("```ruby\nputs 1\n```\n", "nobody runs a block of ruby"),
        ("```\nmake peers\n```\n", "nobody runs a block of no language"),
        ("~~~sh\nmake peers\n~~~\n", "of another kind"),
        ("```sh\nmake peers\n", "not closed"),
        (
            "<!-- serves -->\n```sh\nx\n```\n<!-- prints -->\n```text\n1\n```\n",
            "what a.md:2 prints, which cannot be",
        ),
    ],
)
def test_a_block_that_nobody_would_run_fails(text: str, told: str) -> None:
    with pytest.raises(PageError, match=re.escape(told)):
        blocks_of("a.md", text)


def test_how_pages_are_read() -> None:
    page = (
        "# A\n```sh\necho 1 x  # one\n```\nIt says:\n\n<!-- prints -->\n```text\n1 …\n```\n\n"
        "<!-- needs a GPU -->\n```python\nprint(2)\n```\n1. in a list\n\n"
        "   ```python\n   if 1:\n       print(3)\n   ```\n```json\n{}\n```\n"
    )
    first, second, third = blocks_of("a.md", page)
    assert first == Block("a.md", 2, "sh", "echo 1 x  # one\n", "", "1 …\n")
    assert first.commands == "echo 1 x"
    assert (second.language, second.way, second.code) == ("python", "needs a GPU", "print(2)\n")
    assert third.code == "if 1:\n    print(3)\n"
    assert is_printed("1 …\n", "1 x\n")
    assert not is_printed("1 …", "2 x")


def test_json_that_is_shown_is_json() -> None:
    shown = data_blocks("json")
    assert shown
    for page, code in shown:
        assert json.loads(re.sub(r",\s*…(?=\s*[\]}])", "", code)), page


def test_what_is_installed_by_hand_is_what_is_needed() -> None:
    """docs/gpu.md names the packages, as there is no pyproject.toml that pip could read without a network."""
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = re.findall(r"pip install --no-index --find-links wheels (.*)", page)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {re.match(r"[\w-]+", name).group() for name in project["dependencies"]}  # type: ignore[union-attr]
    assert needed - {"torch"} <= {re.sub(r"[<\"].*", "", word.strip('"')) for word in line.split()}


def _inline() -> list[tuple[str, str]]:
    """Page and command of all that stands in a sentence as something to type, and the lines of shell blocks.

    Those of TRAINING take three hours and more than is installed here: this is all that is checked of them.
    """
    pages = [(page, (ROOT / page).read_text(encoding="utf-8")) for page in (*PAGES, TRAINING)]
    command = re.compile(r"`((?:\w+=\S+ )?(?:make|python -m|tympan|sh|docker compose|kubectl|serve) [^`\n]+)`")
    found = [(page, text) for page, content in pages for text in command.findall(content)]
    blocks = [*BLOCKS, *blocks_of(*pages[-1])]
    return [*found, *((block.page, line) for block in blocks if block.language in SHELL for line in _lines(block))]


def _lines(block: Block) -> list[str]:
    return block.commands.replace("\\\n", " ").splitlines()


def test_commands_in_sentences_name_what_there_is() -> None:
    """Targets, modules, commands, files and flags of ours."""
    commands = _inline()
    assert len(commands) > 100
    for page, command in commands:
        assert set(re.findall(r"^(?:\w+=\S+ )?make ([a-z-]+)", command)) <= TARGETS, f"{page}: {command}"
        for module in re.findall(r"python -m ([\w.]+)", command):
            if (ROOT / module.split(".")[0]).is_dir():
                assert importlib.util.find_spec(module) is not None, f"{page}: {command}"
                assert _flags(command) <= _flags_of(module), f"{page}: {command}"
        for file in re.findall(r"(?:configs|deploy|tests|benchmarks|checkpoints)/[\w./-]+\.\w+", command):
            assert (ROOT / file).exists() or "-o" in command or ">" in command, f"{page}: {command}"
        for folder in re.findall(r"kubectl apply -k (\S+)", command):
            parts = yaml.safe_load((ROOT / folder / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]
            assert all((ROOT / folder / part).exists() for part in parts), f"{page}: {command}"
        for module, name in re.findall(r"serve run ([\w.]+):(\w+)", command):
            source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
            assert re.search(rf"^{name} = ", source, re.MULTILINE), f"{page}: {command}"
        if re.match(r"make serve|python -m server|tympan serve", command):
            assert _flags(command) <= FLAGS, f"{page}: {command}"


def _flags(command: str) -> set[str]:
    return set(re.findall(r"--([a-z][a-z-]+)", command))


@functools.cache
def _flags_of(module: str) -> set[str]:
    """Flags that a program's source names; a package's files all together."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    if module in ("server", "tympan"):
        return FLAGS
    of_the_server = FLAGS if module == "tympan.batch" else set()
    file = Path(spec.origin)
    files = file.parent.glob("*.py") if spec.submodule_search_locations else [file]
    sources = (path.read_text(encoding="utf-8") for path in files)
    return of_the_server | {flag for source in sources for flag in re.findall(r"\"--([a-z][a-z-]+)\"", source)}
