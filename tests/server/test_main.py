"""The command line as a process, and what it makes of settings."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from configs.settings import Settings
from model.errors import CheckpointError, ConfigError
from server.__main__ import BUNDLED_CHECKPOINT, engine_args, find_checkpoint, main
from server.listener import listen
from server.start_progress import StartProgress
from server.summary import startup_summary

from .fake_engine import INFO


def test_what_is_sent_does_not_wait_for_the_client_to_confirm_what_was_sent_before() -> None:
    """Else each event of a stream, and each body behind its head, comes up to 40 ms late."""

    async def main() -> None:
        accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def handle(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            accepted.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with listen("127.0.0.1", 0) as listener:
            async with await asyncio.start_server(handle, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                assert await accepted
                writer.close()

    asyncio.run(main())


def test_wrong_settings_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["server", "--port", "99999"])
    assert main() == 2
    told = capsys.readouterr().err
    assert told.startswith("tympan: port: ")
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--api-key", ""], "api-key: a key is empty"),
        (["--api-key", "secret key"], "api-key: a key has characters"),
        (["--api-key-file", "no-such-file"], "api-key-file: no-such-file cannot be read"),
        (["--api-key", "good", "--api-key-file", "pyproject.toml"], "api-key-file: pyproject.toml: line "),
    ],
)
def test_wrong_keys_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["server", *arguments])
    assert main() == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"tympan: {told}")
    assert "secret" not in shown
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "warns"),
    [
        ([], False),
        (["--host", "0.0.0.0"], True),
        (["--host", "::"], True),
        (["--host", "gpu7"], True),
        (["--host", "127.3.2.1"], False),
        (["--host", "::1"], False),
        (["--host", "localhost"], False),
        (["--host", "0.0.0.0", "--api-key", "k"], False),
    ],
)
def test_a_server_open_to_the_network_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, arguments: list[str], warns: bool
) -> None:
    async def nothing(_: Settings) -> int:
        return 0

    monkeypatch.setattr(sys, "argv", ["server", *arguments])
    monkeypatch.setattr("server.__main__._run", nothing)
    monkeypatch.setattr("server.__main__.configure_logging", lambda *_, **__: None)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert main() == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert ("open to all" in caplog.text) == warns


def test_a_start_that_fails_is_one_sentence() -> None:
    command = [sys.executable, "-m", "server", "--model", "./no-such-folder", "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "no-such-folder" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


def test_a_tokenizer_of_another_checkpoint_is_told_before_the_engine_starts(tmp_path: Path) -> None:
    shutil.copytree(BUNDLED_CHECKPOINT, tmp_path, dirs_exist_ok=True)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"] = tokenizer["added_tokens"][:1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert find_checkpoint(Settings()) == BUNDLED_CHECKPOINT
    with pytest.raises(ConfigError, match=r"^tokenizer\.json is not this checkpoint's: "):
        find_checkpoint(Settings(model=str(tmp_path)))


def test_a_package_without_the_bundled_checkpoint_asks_for_a_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("server.__main__.BUNDLED_CHECKPOINT", tmp_path / "gone")
    with pytest.raises(CheckpointError, match="give a --model"):
        find_checkpoint(Settings())
    assert find_checkpoint(Settings(model=str(BUNDLED_CHECKPOINT))) == BUNDLED_CHECKPOINT


def test_settings_reach_the_engine() -> None:
    settings = Settings(
        device="cpu", dtype="float32", attention_backend="reference", max_model_len=512, max_num_seqs=3,
        max_num_batched_tokens=64, async_scheduling=True, kv_cache_memory_bytes=10**6, gpu_memory_utilization=0.5,
        seed=7, num_speculative_tokens=3, prompt_lookup_min=1, prompt_lookup_max=4,
        long_prefill_token_threshold=77, tensor_parallel_size=2, enforce_eager=True,
    )  # fmt: skip
    args = engine_args(settings, Path("folder"))
    assert args.model_folder == "folder"
    for name in ("device", "dtype", "attention_backend", "max_model_len", "max_num_seqs", "max_num_batched_tokens",
                 "async_scheduling", "kv_cache_memory_bytes", "gpu_memory_utilization", "seed",
                 "num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max",
                 "long_prefill_token_threshold", "tensor_parallel_size", "enforce_eager"):  # fmt: skip
        assert getattr(args, name) == getattr(settings, name)


def test_bundled_checkpoint_is_beside_the_source() -> None:
    assert BUNDLED_CHECKPOINT.parent.parent == Path(__file__).resolve().parents[2]


def test_summary_tells_how_much_fits() -> None:
    info = replace(INFO, num_blocks=500, block_size=16, max_num_seqs=64)
    summary = startup_summary(info, "tiny", "http://127.0.0.1:8000")
    assert "10 requests at once" in summary  # 50 blocks for 750 + 50 tokens
    assert "at most 512 tokens (fake)" in summary
    assert "graphs" not in summary
    assert "graphs     11 of decode steps" in startup_summary(
        replace(info, cuda_graphs="11 of decode steps"), "", ""
    )
    assert "curl http://127.0.0.1:8000/v1/chat/completions" in summary


def test_the_request_to_paste_survives_the_shell() -> None:
    summary = startup_summary(INFO, "it's", "http://127.0.0.1:1", has_keys=True)
    command = summary.splitlines()[-1].strip()
    words = subprocess.run(
        ["bash", "-c", f"curl() {{ printf '%s\\n' \"$@\"; }}; OPENAI_API_KEY=secret; {command}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert words[:5] == [
        "http://127.0.0.1:1/v1/chat/completions", "-H", "Content-Type: application/json",
        "-H", "Authorization: Bearer secret",
    ]  # fmt: skip
    assert json.loads(words[-1])["model"] == "it's"


def test_a_start_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with StartProgress() as progress:
        progress(3, 532)
        progress(532, 532)
    shown = capsys.readouterr().err
    assert "532/532" in shown
    assert "getting ready" in shown


@pytest.mark.parametrize(("is_terminal", "as_json"), [(False, False), (True, True)])
def test_elsewhere_it_is_two_log_lines(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    is_terminal: bool,
    as_json: bool,
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    with caplog.at_level(logging.INFO), StartProgress(as_json=as_json) as progress:
        progress(3, 532)
        progress(532, 532)
    assert [record.getMessage() for record in caplog.records] == ["starting the engine", "loaded 532 tensors"]
    assert capsys.readouterr().err == ""
