"""The command `tympan`: what it takes, how quickly, and how it ends."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from server.version import VERSION
from tympan.cli.errors import CommandError
from tympan.cli.main import app

HELP_SECONDS = 0.5


def test_every_command_has_help() -> None:
    told = CliRunner().invoke(app, ["--help"])
    assert told.exit_code == 0
    commands = [command.name or command.callback.__name__ for command in app.registered_commands]  # type: ignore[union-attr]
    assert commands
    for name in commands:
        assert f"\n  {name} " in told.stdout
        help_text = CliRunner().invoke(app, [name, "--help"])
        assert help_text.exit_code == 0, name
        assert "usage" in help_text.stdout.lower(), name


def test_the_version_is_the_servers() -> None:
    told = CliRunner().invoke(app, ["--version"])
    assert (told.exit_code, told.stdout) == (0, f"tympan {VERSION}\n")


@pytest.mark.parametrize("command", [["--help"], ["serve", "--help"], ["doctor", "--help"]])
def test_help_is_there_at_once(command: list[str]) -> None:
    """By the processor's time: a clock would measure what else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "tympan", *command], check=True, capture_output=True, timeout=200)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < HELP_SECONDS


def test_serve_has_the_servers_flags() -> None:
    told = CliRunner().invoke(app, ["serve", "--help"]).stdout
    assert "usage: tympan serve" in told
    assert "--kv-cache-memory-bytes" in told


def test_serve_hands_its_flags_over(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(settings: object) -> int:
        asked.append(settings)
        return 7

    monkeypatch.setattr("server.__main__.run", run)
    ended = CliRunner().invoke(
        app, ["serve", "--port", "0", "--no-enable-prefix-caching", "--served-model-name", "a", "b"]
    )
    assert ended.exit_code == 7
    assert (asked[0].port, asked[0].enable_prefix_caching, asked[0].served_model_name) == (0, False, ("a", "b"))  # type: ignore[attr-defined]


@pytest.mark.parametrize("arguments", [["serve", "--port", "99999"], ["chat", "--url", "localhost:8000"]])
def test_wrong_arguments_are_one_sentence(arguments: list[str]) -> None:
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 2
    assert ended.stderr.startswith("tympan: ")
    assert len(ended.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(("error", "status"), [(CommandError("no"), 1), (KeyboardInterrupt(), 130)])
def test_ends_have_a_status(monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int) -> None:
    def run(*_: object) -> None:
        raise error

    monkeypatch.setattr("tympan.cli.chat.run", run)
    assert CliRunner().invoke(app, ["chat"]).exit_code == status
