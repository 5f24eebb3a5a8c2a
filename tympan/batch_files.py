"""The two files of a batch: requests, one JSON object a line, and results, in OpenAI's batch format.

Requests are read a line at a time and never held. The result file is the whole state of a run: a line in it with
status 200 is an answer and stays; anything else is dropped when the run is taken up again, and done anew. Each line
is one write, so that a kill can tear the last one only.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

from pydantic_core import from_json, to_json

from server.http.json_body import MAX_JSON_VALUES

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
ENVELOPE_BYTES = 64 * 1024
"""Of a line, besides its body."""
_BOM = b"\xef\xbb\xbf"
_BLOCK = 1 << 20


class ResultFileError(Exception):
    """The result file holds something else or is in use; nothing was written."""


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One line that can be sent."""

    line: int
    custom_id: str
    url: str
    body: bytes = field(repr=False)

    @property
    def size(self) -> int:
        """Bytes that it keeps in memory."""
        return len(self.body)


@dataclass(frozen=True, slots=True)
class LineError:
    """One line that cannot."""

    line: int
    code: str
    message: str
    param: str | None = None
    custom_id: str | None = None

    @property
    def size(self) -> int:
        """Bytes that it keeps in memory: next to none."""
        return 0

    def to_json(self) -> dict[str, Any]:
        """As OpenAI lists errors of a batch."""
        return {"code": self.code, "message": self.message, "param": self.param, "line": self.line}


def count_requests(path: Path) -> int:
    """Lines of the file, blank ones among them. Raises OSError."""
    count, last = 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            count += block.count(b"\n")
            last = block[-1:]
    return count + (last != b"\n")


def read_requests(file: BinaryIO, answered: set[str], max_body_bytes: int) -> Iterator[BatchRequest | LineError]:
    """The lines that are still to do. Blank ones and those whose custom_id is in `answered` are passed over.

    At most one line is in memory, and of one longer than `max_body_bytes` and its envelope not even that.
    """
    seen: set[str] = set()
    for number, line in _lines(file, max_body_bytes + ENVELOPE_BYTES):
        if line is None:
            yield LineError(number, "line_too_large", f"The line is longer than {max_body_bytes} bytes.")
            continue
        request = parse_request(number, line)
        if request.custom_id is not None and request.custom_id in seen:
            message = f"The custom_id {request.custom_id[:100]!r} is that of an earlier line."
            yield LineError(number, "duplicate_custom_id", message, "custom_id")
            continue
        if request.custom_id is not None:
            seen.add(request.custom_id)
        if request.custom_id not in answered:
            yield request


def parse_request(number: int, line: bytes) -> BatchRequest | LineError:
    """What a line asks for. Its body is only known to be an object: the rest is for the API to judge."""
    if sum(line.count(sign) for sign in (b",", b"[", b"{")) > MAX_JSON_VALUES:
        return LineError(number, "line_too_large", "The line holds too many values.")
    try:
        record = from_json(line)
    except ValueError:
        return LineError(number, "invalid_json_line", "The line is not valid JSON.")
    if not isinstance(record, dict):
        return LineError(number, "invalid_json_line", "The line is no JSON object.")
    custom_id = record.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        message = "'custom_id' must be a string that is not empty."
        return LineError(number, "invalid_custom_id", message, "custom_id")
    if (method := record.get("method", "POST")) != "POST":
        message = f"'method' must be POST, not {str(method)[:20]!r}."
        return LineError(number, "invalid_method", message, "method", custom_id)
    if (url := record.get("url")) not in URLS:
        message = f"'url' must be one of {', '.join(URLS)}; this is {str(url)[:100]!r}."
        return LineError(number, "invalid_url", message, "url", custom_id)
    body = record.get("body")
    if not isinstance(body, dict):
        return LineError(number, "invalid_body", "'body' must be an object.", "body", custom_id)
    if body.get("stream"):
        message = "A batch has no streams: leave 'stream' out."
        return LineError(number, "stream_not_supported", message, "body.stream", custom_id)
    return BatchRequest(number, custom_id, url, to_json(body))


def _lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines that are not blank; None for one that is too long."""
    number = 0
    while line := file.readline(max_bytes + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(_BOM)
        if len(line) > max_bytes and not line.endswith(b"\n"):
            while (rest := file.readline(_BLOCK)) and not rest.endswith(b"\n"):
                pass
            yield number, None
        elif line.strip():
            yield number, line


class ResultFile:
    """Results, appended as they come. Close when done."""

    def __init__(self, file: BinaryIO, answered: set[str]) -> None:
        self._file = file
        self.answered = answered
        """custom_ids that had an answer when the file was opened."""

    @classmethod
    def open(cls, path: Path) -> Self:
        """Take up the file of an earlier run, or begin one.

        Raises OSError, and ResultFileError when the file holds anything but results or another run has it.
        """
        file = _open_alone(path)
        answered, is_clean = _read_results(path)
        if not is_clean:
            _keep_answers(path)
            with file:  # the file before: locked until the new one is
                file = _open_alone(path)
        return cls(file, answered)

    def write(
        self,
        custom_id: str | None,
        *,
        response: Mapping[str, Any] | None = None,
        error: Mapping[str, Any] | None = None,
    ) -> None:
        """One result: a response of any status, or why there is none. Raises OSError."""
        record = {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": custom_id,
            "response": response,
            "error": error,
        }
        line = memoryview(to_json(record) + b"\n")
        while line:  # a full disk or a signal may cut a write short
            line = line[self._file.write(line) :]

    def close(self) -> None:
        """Bring all of it to the disk."""
        os.fsync(self._file.fileno())
        self._file.close()


def _open_alone(path: Path) -> BinaryIO:
    file = path.open("ab", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ResultFileError(f"{path} is being written by another run") from None
    return file


def _read_results(path: Path) -> tuple[set[str], bool]:
    """-> the custom_ids that have answers, and whether the file holds nothing else."""
    answered: set[str] = set()
    is_clean = True
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            answer = _answer_of(line)
            if answer is None and line.endswith(b"\n"):
                raise ResultFileError(f"{path}: line {number} is no result of a batch")
            if not answer or answer in answered or not line.endswith(b"\n"):
                is_clean = False
            else:
                answered.add(answer)
    return answered, is_clean


def _keep_answers(path: Path) -> None:
    """Rewrite the file without failures, repetitions and a torn last line, at one stroke."""
    kept: set[str] = set()
    rewritten = path.with_name(path.name + ".tmp")
    with path.open("rb") as old, rewritten.open("wb") as new:
        for line in old:
            answer = _answer_of(line)
            if answer and answer not in kept and line.endswith(b"\n"):
                kept.add(answer)
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    rewritten.replace(path)


def _answer_of(line: bytes) -> str | None:
    """The custom_id that a line answers; empty for a failure, None for what is no result."""
    try:
        record = from_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not record.keys() >= {"id", "custom_id", "response", "error"}:
        return None
    response, custom_id = record["response"], record["custom_id"]
    is_answer = isinstance(response, dict) and response.get("status_code") == 200 and isinstance(custom_id, str)
    return str(custom_id) if is_answer else ""
