"""Request lines, good and bad, and a result file that survives being torn anywhere."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tympan.batch_files import (
    BatchRequest,
    LineError,
    ResultFile,
    ResultFileError,
    count_requests,
    parse_request,
    read_requests,
)

GOOD = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}


def line(**changes: Any) -> bytes:
    return json.dumps({key: value for key, value in (GOOD | changes).items() if value != "left out"}).encode()


def read(
    text: bytes, answered: set[str] | None = None, max_body_bytes: int = 1000
) -> list[BatchRequest | LineError]:
    return list(read_requests(io.BytesIO(text), answered or set(), max_body_bytes))


def test_a_line_is_what_is_sent() -> None:
    request = parse_request(3, line(body={"messages": [], "temperature": 0.1, "seed": 2**62, "x": "é"}))
    assert isinstance(request, BatchRequest)
    assert (request.line, request.custom_id, request.url) == (3, "a", "/v1/chat/completions")
    assert json.loads(request.body) == {"messages": [], "temperature": 0.1, "seed": 2**62, "x": "é"}


@pytest.mark.parametrize("url", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_what_may_be_asked(url: str) -> None:
    request = parse_request(1, line(url=url))
    assert isinstance(request, BatchRequest)
    assert request.url == url


@pytest.mark.parametrize(
    ("text", "code", "param", "custom_id"),
    [
        (b'{"custom_id": "a"', "invalid_json_line", None, None),
        (b"\xff\xfe", "invalid_json_line", None, None),
        (b"[" * 100_000, "invalid_json_line", None, None),
        (b"[" * 600_000, "line_too_large", None, None),
        (b"[]", "invalid_json_line", None, None),
        (b"7", "invalid_json_line", None, None),
        (line(custom_id="left out"), "invalid_custom_id", "custom_id", None),
        (line(custom_id=7), "invalid_custom_id", "custom_id", None),
        (line(custom_id=""), "invalid_custom_id", "custom_id", None),
        (line(method="GET"), "invalid_method", "method", "a"),
        (line(method=["POST"]), "invalid_method", "method", "a"),
        (line(url="left out"), "invalid_url", "url", "a"),
        (line(url="/v1/embeddings"), "invalid_url", "url", "a"),
        (line(url={}), "invalid_url", "url", "a"),
        (line(body="left out"), "invalid_body", "body", "a"),
        (line(body="{}"), "invalid_body", "body", "a"),
        (line(body={"stream": True}), "stream_not_supported", "body.stream", "a"),
    ],
)
def test_what_is_no_request_is_told_in_its_line(
    text: bytes, code: str, param: str | None, custom_id: str | None
) -> None:
    (error,) = read(text, max_body_bytes=10**6)
    assert isinstance(error, LineError)
    assert (error.code, error.param, error.custom_id, error.line) == (code, param, custom_id, 1)
    assert len(error.message) < 300


def test_lines_are_numbered_as_editors_do(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbf" + line() + b"\r\n\n  \n{\n" + line(custom_id="b")
    assert [item.line for item in read(text)] == [1, 4, 5]
    (tmp_path / "requests").write_bytes(text)
    assert count_requests(tmp_path / "requests") == 5


def test_what_is_answered_is_passed_over_and_a_repeated_id_is_an_error() -> None:
    text = b"\n".join(line(custom_id=name) for name in "abacb")
    assert [(item.line, getattr(item, "code", None)) for item in read(text, {"b"})] == [
        (1, None),
        (3, "duplicate_custom_id"),
        (4, None),
        (5, "duplicate_custom_id"),
    ]


def test_a_line_without_end_is_never_in_memory() -> None:
    class Endless(io.RawIOBase):
        """200 MB of one line, then a good one."""

        left = 200 << 20

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            if self.left <= 0:
                end = b"" if self.left < 0 else b"\n" + line()
                self.left = -1
                buffer[: len(end)] = end
                return len(end)
            count = min(len(buffer), self.left)
            buffer[:count] = b"x" * count
            self.left -= count
            return count

    tracemalloc.start()
    file: BinaryIO = io.BufferedReader(Endless())
    first, second = read_requests(file, set(), 1 << 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(first, LineError)
    assert first.code == "line_too_large"
    assert isinstance(second, BatchRequest)
    assert peak < 16 << 20


def ok(text: str = "Hi") -> dict[str, Any]:
    return {"status_code": 200, "request_id": "r", "body": {"text": text}}


def ids(path: Path) -> list[str | None]:
    return [json.loads(result)["custom_id"] for result in path.read_bytes().splitlines()]


def test_results_are_openais(tmp_path: Path) -> None:
    results = ResultFile.open(tmp_path / "out")
    results.write("a", response=ok())
    results.write(None, error=LineError(2, "invalid_json_line", "No.").to_json())
    results.close()
    first, second = map(json.loads, (tmp_path / "out").read_text().splitlines())
    assert first.pop("id") != second.pop("id")
    assert first == {"custom_id": "a", "response": ok(), "error": None}
    error = {"code": "invalid_json_line", "message": "No.", "param": None, "line": 2}
    assert second == {"custom_id": None, "response": None, "error": error}


def test_failures_are_dropped_and_answers_stay_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "out"
    results = ResultFile.open(path)
    results.write("a", response=ok())
    results.write("b", response={"status_code": 500, "request_id": "r", "body": {}})
    results.write(None, error={})
    results.write("c", response=ok("é\u2028"))
    results.close()
    kept = [text for text in path.read_bytes().split(b"\n") if b'"a"' in text or b'"c"' in text]
    results = ResultFile.open(path)
    assert results.answered == {"a", "c"}
    results.close()
    assert path.read_bytes() == b"".join(text + b"\n" for text in kept)
    assert [child.name for child in tmp_path.iterdir()] == ["out"]


@given(cut=st.integers(0, 2000), names=st.lists(st.text('ab\n"é', min_size=1), unique=True, max_size=6))
def test_a_file_torn_anywhere_keeps_its_whole_answers(
    cut: int, names: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("torn") / "out"
    results = ResultFile.open(path)
    for name in names:
        results.write(name, response=ok())
    results.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    num_whole = whole[:cut].count(b"\n")
    results = ResultFile.open(path)
    assert results.answered == set(names[:num_whole])
    results.write("next", response=ok())
    results.close()
    assert ids(path) == [*names[:num_whole], "next"]


@pytest.mark.parametrize("text", [b"my diary\n", b'{"custom_id": "a", "body": {}}\n', b"[]\n", b"\x00\n"])
def test_a_file_of_something_else_is_not_touched(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out"
    results = ResultFile.open(path)
    results.write("a", response=ok())
    results.close()
    before = path.read_bytes() + text
    path.write_bytes(before)
    with pytest.raises(ResultFileError, match="line 2"):
        ResultFile.open(path)
    assert path.read_bytes() == before


def test_two_runs_never_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for text in (b"", b'{"torn'):
        path.write_bytes(text)
        first = ResultFile.open(path)
        with pytest.raises(ResultFileError, match="another run"):
            ResultFile.open(path)
        first.write("a", response=ok())
        first.close()
        assert ids(path) == ["a"]
        second = ResultFile.open(path)
        assert second.answered == {"a"}
        second.close()
