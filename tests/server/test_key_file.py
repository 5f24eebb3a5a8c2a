"""Keys in a file: read again when it changes, and no accident with it ever opens the server."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import secrets
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.access.auth import ApiKeys
from server.access.key_file import CHECK_SECONDS, MAX_FILE_BYTES, KeyFile, KeysError
from server.errors import ApiError

from .conftest import Servers


class Clock:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("# ours\n\n  first \nsecond\r\n")
    return file


def opens(keys: ApiKeys, key: str) -> bool:
    try:
        keys.check([f"Bearer {key}"])
    except ApiError as error:
        return error.status != 401
    return True


def test_keys_change_with_the_file(path: Path) -> None:
    clock = Clock()
    keys = ApiKeys(["fixed"], KeyFile(path, clock))
    assert [opens(keys, key) for key in ("fixed", "first", "second", "# ours", "third")] == [True] * 3 + [False] * 2
    assert len(keys) == 3
    path.write_text("third\n")
    assert opens(keys, "first"), "looked at only every few seconds"
    clock.now += CHECK_SECONDS
    assert [opens(keys, key) for key in ("fixed", "first", "third")] == [True, False, True]


def test_a_rename_is_a_change(path: Path, tmp_path: Path) -> None:
    clock = Clock()
    keys = ApiKeys((), KeyFile(path, clock))
    new = tmp_path / "new"
    new.write_text("# ours\n\n  other \nsecond\r\n")
    times = path.stat()
    os.utime(new, ns=(times.st_atime_ns, times.st_mtime_ns))
    new.replace(path)
    clock.now += CHECK_SECONDS
    assert opens(keys, "other")
    assert not opens(keys, "first")


@pytest.mark.parametrize(
    "content", [None, b"", b"# none\n", b"a b\n", "schlüssel\n".encode(), b"\xff\n", b"k\n" * MAX_FILE_BYTES]
)
def test_a_broken_file_keeps_the_good_keys(
    path: Path, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    clock = Clock()
    keys = ApiKeys((), KeyFile(path, clock))
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    for _ in range(3):
        clock.now += CHECK_SECONDS
        assert opens(keys, "first")
        assert not opens(keys, "third")
    (told,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "stay valid" in told.getMessage()
    path.write_text("third\n")
    clock.now += CHECK_SECONDS
    assert opens(keys, "third")
    assert not opens(keys, "first")


@pytest.mark.parametrize("content", [None, b"", b"# none\n", b"a b\n", b"\xff\n"])
def test_a_broken_file_does_not_start(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(KeysError, match="api-key-file"):
        KeyFile(path)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "keys")
    with pytest.raises(KeysError, match="no file"):
        KeyFile(tmp_path / "keys")


@pytest.mark.parametrize("key", ["", " ", "a b", "a\tb", "ключ", "a\n", "\x7f"])
def test_silly_keys_are_refused_by_name(key: str) -> None:
    with pytest.raises(KeysError, match="api-key: a key") as caught:
        ApiKeys(["good", key])
    assert not key.strip() or key not in str(caught.value)


@given(st.text(), st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40))
def test_nothing_but_a_key_opens(guess: str, key: str) -> None:
    keys = ApiKeys([key, "other"])
    assert opens(keys, key)
    assert opens(keys, guess) == (guess.strip() in (key, "other"))


def test_every_key_is_compared(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever fits: hashes, so that no length and no common beginning shows; of flags and file."""
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr("server.access.auth.secrets.compare_digest", compare)
    path.write_text("four\nfive\n")
    keys = ApiKeys(["one", "two", "three"], KeyFile(path))
    digests = [hashlib.sha256(key.encode()).digest() for key in ("one", "two", "three", "four", "five")]
    for guess in ("one", "three", "five", "none", "on", "one" * 1000):
        compared.clear()
        opens(keys, guess)
        assert [other for _, other in compared] == digests
        assert {one for one, _ in compared} == {hashlib.sha256(guess.encode()).digest()}
    assert not any(key in repr(vars(keys)) for key in ("'one'", "'two'", "three", "four"))


class Early(ApiKeys):
    """What a comparison that stops at the first fit takes: the measure has to see it."""

    def check(self, authorizations: Sequence[str]) -> str:
        digest = hashlib.sha256(authorizations[0].partition(" ")[2].encode()).digest()
        assert any(secrets.compare_digest(digest, other) for other in self._known())
        return digest.hex()


def apart(keys: ApiKeys, one: str, other: str, rounds: int = 400) -> tuple[float, float]:
    """-> Welch's t of the faster halves of both guesses' times, taken in turn, and the difference as a share."""
    taken: tuple[list[int], list[int]] = ([], [])
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            authorizations = [f"Bearer {(one, other)[which]}"]
            started = time.perf_counter_ns()
            with contextlib.suppress(ApiError):
                keys.check(authorizations)
            taken[which].append(time.perf_counter_ns() - started)
    halves = [sorted(times)[: rounds // 2] for times in taken]
    difference = statistics.mean(halves[0]) - statistics.mean(halves[1])
    error = math.sqrt(sum(statistics.variance(half) / len(half) for half in halves))
    return abs(difference) / max(error, 1e-9), abs(difference) / statistics.mean(halves[0])


def tells(keys: ApiKeys, one: str, other: str) -> bool:
    """Whether the times of two guesses differ three times in a row, by more than a hundredth and beyond chance."""
    return all(t > 5 and share > 0.01 for t, share in (apart(keys, one, other) for _ in range(3)))


def test_times_do_not_tell_keys_apart() -> None:
    """CVE-2025-59425: neither which key fits, nor how much of one a guess has right."""
    names = [f"key-of-somebody-{number:04d}" for number in range(256)]
    keys, first, last = ApiKeys(names), names[0], names[-1]
    assert tells(Early(names), first, last), "else nothing is measured"
    assert not tells(keys, first, last)
    assert not tells(keys, first[:-1] + "x", "x" * len(first))
    assert not tells(keys, last[:-1] + "x", "x" * len(last))


def test_a_server_with_a_file_alone_is_closed(servers: Servers, path: Path, caplog: Any) -> None:
    server = servers.start(api_key_file=str(path))
    get = server.client.get
    assert get(f"{server.url}/v1/models").status_code == 401
    assert get(f"{server.url}/v1/models", headers={"Authorization": "Bearer second"}).status_code == 200
    path.write_text("")
    assert get(f"{server.url}/v1/models").status_code == 401
    assert "first" not in caplog.text
    assert "second" not in caplog.text
