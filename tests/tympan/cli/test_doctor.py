"""`tympan doctor`: five broken set-ups, each told in one sentence that says what to do, and that `serve` has too."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from model.config import Qwen2AudioConfig
from model.weight_files import INDEX_FILE, SINGLE_FILE
from server.__main__ import BUNDLED_CHECKPOINT
from server.listener import ListenError, listen
from tympan.cli import doctor
from tympan.cli.main import app

ROOT = Path(__file__).resolve().parents[3]
WAIT_SECONDS = 250
"""An engine starts in a few; on a machine that is busy with something else, in many."""
Setup = Callable[[Path], tuple[list[str], str]]
"""Given a folder to make it in -> the flags, and what has to be told."""


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


def no_gpu(_: Path) -> tuple[list[str], str]:
    return ["--device", "cuda"], "--device cuda: torch sees no CUDA device here; use --device cpu or mend the driver"


def missing_shard(folder: Path) -> tuple[list[str], str]:
    shutil.copytree(BUNDLED_CHECKPOINT, folder, dirs_exist_ok=True)
    tensors = load_file(folder / SINGLE_FILE)
    (folder / SINGLE_FILE).unlink()
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    names = sorted(tensors)
    weight_map = {name: shards[2 * index >= len(names)] for index, name in enumerate(names)}
    save_file({name: tensors[name] for name in names if weight_map[name] == shards[0]}, folder / shards[0])
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    told = f"weight file {shards[1]} is missing from {folder}: copy it there from where the others came from, or "
    return ["--model", str(folder)], f"{told}fetch the checkpoint by `tympan models download`"


def wrong_tokenizer(folder: Path) -> tuple[list[str], str]:
    shutil.copytree(BUNDLED_CHECKPOINT, folder, dirs_exist_ok=True)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    audio_token = json.loads((folder / "config.json").read_text())["audio_token_index"]
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] != audio_token]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    told = f"tokenizer.json is not this checkpoint's: its audio token, {audio_token} in config.json, is no control "
    return ["--model", str(folder)], f"{told}token of it; take tokenizer.json from where the weights came from"


def small_kv_cache(_: Path) -> tuple[list[str], str]:
    config = Qwen2AudioConfig.from_folder(BUNDLED_CHECKPOINT).text
    num_tokens = config.max_position_embeddings
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    told = f"the KV cache holds 32 tokens, --max-model-len is {num_tokens}: lower that, or give the cache "
    flags = ["--dtype", "float32", "--kv-cache-memory-bytes", str(33 * token_bytes)]
    return flags, f"{told}{num_tokens * token_bytes} bytes by --kv-cache-memory-bytes"


def tympan(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tympan", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "setup",
    [
        pytest.param(
            no_gpu, marks=pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what this machine has")
        ),
        missing_shard,
        wrong_tokenizer,
        small_kv_cache,
    ],
)
def test_a_broken_setup_is_one_sentence_here_and_in_serve(setup: Setup, tmp_path: Path) -> None:
    flags, told = setup(tmp_path)
    examined, served = tympan("doctor", "--json", "--port", "0", *flags), tympan("serve", "--port", "0", *flags)
    report = json.loads(examined.communicate(timeout=WAIT_SECONDS)[0])
    shown = served.communicate(timeout=WAIT_SECONDS)[1]
    assert (examined.returncode, served.returncode) == (1, 1)
    assert not report["ok"]
    assert [check["text"] for check in report["checks"] if check["state"] == "failed"] == [told]
    assert shown.splitlines()[-1] == f"tympan: the server cannot start: {told}"
    assert "Traceback" not in shown


def test_a_taken_port_and_nothing_else(taken_port: int) -> None:
    told = f"cannot listen on 127.0.0.1:{taken_port}: the port is taken: end what listens there, or choose another"
    told = f"{told} by --port"
    served = tympan("serve", "--port", str(taken_port))
    shown = served.communicate(timeout=WAIT_SECONDS)[1]
    assert (served.returncode, shown) == (1, f"tympan: {told}\n")
    examined = tympan("doctor", "--port", str(taken_port))
    lines = examined.communicate(timeout=WAIT_SECONDS)[0].splitlines()
    assert examined.returncode == 1
    assert f"failed  port        {told}" in lines
    names = ["software", "devices", "memory", "access", "checkpoint", "engine", "attention", "context", "self-test"]
    assert [line.split()[1] for line in lines if line.startswith("ok")] == names
    assert lines[-1] == 'ok      self-test   the bundled checkpoint heard "four two seven"'
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    shown = re.findall(r"^(?:ok|failed) +.*$", page, re.MULTILINE)
    assert [line.split()[:2] for line in shown] == [line.split()[:2] for line in lines]
    same = ("access", "port", "self-test")
    assert [line.replace(":8000", f":{taken_port}") for line in shown if line.split()[1] in same] == [
        line for line in lines if line.split()[1] in same
    ]


def test_wrong_settings_are_told_as_by_serve() -> None:
    ended = CliRunner().invoke(app, ["doctor", "--port", "99999"])
    assert ended.exit_code == 2
    assert ended.stderr.startswith("tympan: port: ")
    assert "usage: tympan doctor" in CliRunner().invoke(app, ["doctor", "--help"]).stdout


def test_warnings_are_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    async def examine(_: Any) -> Any:
        yield doctor.Check("access", doctor.State.WARNING, "open to all")

    monkeypatch.setattr(doctor, "examine", examine)
    ended = CliRunner().invoke(app, ["doctor", "--json"])
    assert (ended.exit_code, json.loads(ended.stdout)["ok"]) == (0, True)


@pytest.mark.parametrize(
    ("host", "port", "told"),
    [
        ("192.0.2.1", 8000, "this machine does not have that address"),
        ("no.invalid", 8000, "cannot listen on no.invalid:8000"),
    ],
)
def test_addresses_that_cannot_be_had(host: str, port: int, told: str) -> None:
    with pytest.raises(ListenError, match=told):
        listen(host, port)
