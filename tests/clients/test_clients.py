"""Other people's clients against a real server: the programs of docs/clients.md, run as they stand.

Each prints a whole answer, the pieces of a stream, an answer about a clip, and an error as the client shows it.
`make clients` makes their environments, with the major versions that are named here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, ServerProcess

pytestmark = pytest.mark.clients

CLIENTS = ROOT / ".clients"
PAGE = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
PROGRAMS = dict(re.findall(r"^## (.+?)\n\n<!-- [^\n]+ -->\n```\w+\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL))
PYTHON_CLIENTS = {
    "openai 3": ("openai for Python", "openai3", "openai"),
    "openai 2": ("openai for Python", "openai2", "openai"),
    "langchain-openai 1": ("LangChain", "openai3", "langchain-openai"),
    "litellm 1": ("LiteLLM", "openai2", "litellm"),
}
ERROR = "400 temperature integer_above_max_value Invalid 'temperature': "


def run(server: ServerProcess, title: str, *command: str | Path, file: Path) -> str:
    """Run a program against the server in place of the one on port 8000. -> what it prints."""
    file.write_text(PROGRAMS[title].replace("http://127.0.0.1:8000", server.url), encoding="utf-8")
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    done = subprocess.run(
        [*command, file],
        cwd=ROOT,
        env={**environment, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},  # else it asks GitHub for prices
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def installed(path: Path) -> Path:
    if not path.exists():
        pytest.fail(f"{path.relative_to(ROOT)} is missing: run `make clients`")
    return path


def check(printed: str) -> None:
    """What every client must have shown."""
    said = dict(line.split(": ", 1) for line in printed.splitlines() if ": " in line)
    assert said["whole"] == "Please send me some audio."
    pieces = [piece for piece in said["stream"].split("|") if piece]
    assert "".join(pieces) == "four two seven"
    assert len(pieces) > 1
    assert said["audio"] == "four two seven"
    assert said["error"].startswith(ERROR)


@pytest.mark.parametrize("client", PYTHON_CLIENTS)
def test_python_clients(client: str, bundled_server: ServerProcess, tmp_path: Path) -> None:
    title, environment, package = PYTHON_CLIENTS[client]
    python = installed(CLIENTS / environment / "bin" / "python")
    asked = f"import importlib.metadata as m; print(m.version({package!r}))"
    version = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout
    assert version.startswith(client.split()[1] + ".")
    check(run(bundled_server, title, python, file=tmp_path / "program.py"))


def test_openai_for_node(bundled_server: ServerProcess) -> None:
    package = installed(CLIENTS / "node" / "node_modules" / "openai" / "package.json")
    assert json.loads(package.read_text(encoding="utf-8"))["version"].startswith("7.")
    # beside node_modules: that is where imports are looked for
    node = CLIENTS / "node" / "bin" / "node"
    check(run(bundled_server, "openai for Node", str(node), file=CLIENTS / "node" / "program.js"))


def test_curl(bundled_server: ServerProcess, tmp_path: Path) -> None:
    printed = run(bundled_server, "curl", "bash", "-euo", "pipefail", file=tmp_path / "program.sh")
    whole, stream, audio, error = re.split(r"^(?:whole|stream|audio|error): ", printed, flags=re.M)[1:]
    assert json.loads(whole)["choices"][0]["message"]["content"] == "Please send me some audio."
    assert json.loads(audio)["choices"][0]["message"]["content"] == "four two seven"
    events = [line.removeprefix("data: ") for line in stream.splitlines() if line]
    assert events.pop() == "[DONE]"
    pieces = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(pieces) == "four two seven"
    body, status = error.strip().rsplit(" ", 1)
    told = json.loads(body)["error"]
    assert f"{status} {told['param']} {told['code']} {told['message']}".startswith(ERROR)
    assert told["type"] == "invalid_request_error"


def test_every_program_of_the_page_is_run() -> None:
    run_here = {title for title, _, _ in PYTHON_CLIENTS.values()} | {"openai for Node", "curl"}
    assert set(PROGRAMS) == run_here
