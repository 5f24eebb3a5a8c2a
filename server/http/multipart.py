"""From the bytes of a multipart/form-data request to its fields and its file, in bounded memory.

All bytes are counted while they are read; the file goes to a temporary file that stays in memory while it is small
and has no name on disk after. There is one file, in the field `file`. Knows nothing of what the other fields mean:
their values are text.
"""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Self

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from server.access.held_bytes import HeldBytes
from server.errors import ApiError, bad_request
from server.http.body import check_declared_size, check_not_encoded, refused_when_full, too_large

FILE_FIELD = "file"
MAX_PARTS = 128
"""Of a form: clients repeat a field for each item of a list."""
MAX_FIELD_BYTES = 256 << 10
"""Of all fields together, names included; the file aside."""
MAX_SPOOLED_BYTES = 128 << 10
"""Of a file kept in memory; a longer one goes to disk."""
MAX_NAME_CHARS = 255
"""Of a file's name: what is longer is cut."""


@dataclass(frozen=True, slots=True)
class UploadedFile:
    """A file of the form."""

    name: str
    """As the client calls it: shown, never opened."""
    content: IO[bytes]
    """Stands at its beginning."""


@dataclass(frozen=True, slots=True)
class Form:
    """A form that was read. A context manager: its file is gone after."""

    fields: dict[str, list[str]]
    """By name, in the order in which they came."""
    file: UploadedFile

    def close(self) -> None:
        """Forget the file. Closing twice is no error."""
        self.file.content.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def read_form(request: Request, max_bytes: int) -> Form:
    """Read a form that has a file. Close it when done.

    Raises ApiError: 413 above `max_bytes`, 415 for another content type or encoding, 400 for what is no form or
    has no file, 503 when bodies take too much already.
    """
    held: HeldBytes = request.state.held
    media_type, options = parse_options_header(request.headers.get("content-type"))
    if media_type.lower() != b"multipart/form-data":
        raise ApiError(415, "The Content-Type header must be multipart/form-data.")
    check_not_encoded(request)
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:  # RFC 2046
        raise bad_request("The Content-Type header must have a boundary of 1 to 70 characters.")
    check_declared_size(request, max_bytes)
    reader = _Reader(boundary)
    try:
        num_bytes = 0
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise too_large(max_bytes)
            with refused_when_full():
                if num_bytes > MAX_SPOOLED_BYTES:  # what goes to disk may have to wait for it
                    await asyncio.to_thread(reader.write, chunk)
                else:
                    reader.write(chunk)
            held.hold(memory=reader.num_memory_bytes, disk=reader.num_disk_bytes)
        return reader.finish()
    except BaseException:
        reader.close()
        raise


class _Reader:
    """Takes the parser's events. What is in progress is one part."""

    def __init__(self, boundary: bytes) -> None:
        self._fields: dict[str, list[str]] = {}
        self._file: UploadedFile | None = None
        self._num_parts = 0
        self._num_field_bytes = 0
        self._num_file_bytes = 0
        self._is_complete = False
        self._header = b""
        self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._name = ""
        self._target: IO[bytes] | None = None
        """Where the part's bytes go: a file, or None for a field, whose bytes are gathered."""
        self._gathered = bytearray()
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_part_data": self._part_data,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    @property
    def num_memory_bytes(self) -> int:
        """Of fields, and of the file while it is there."""
        return self._num_field_bytes + (self._num_file_bytes if self._num_file_bytes <= MAX_SPOOLED_BYTES else 0)

    @property
    def num_disk_bytes(self) -> int:
        """Of the file."""
        return self._num_file_bytes if self._num_file_bytes > MAX_SPOOLED_BYTES else 0

    def write(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError:
            raise _malformed() from None

    def finish(self) -> Form:
        if not self._is_complete:
            raise _malformed()
        if self._file is None:
            what = "must be a file, not text" if FILE_FIELD in self._fields else "is missing"
            message = f"Missing required parameter: '{FILE_FIELD}' {what}."
            raise bad_request(message, FILE_FIELD, "missing_required_parameter")
        self._file.content.seek(0)
        return Form(self._fields, self._file)

    def close(self) -> None:
        if self._file is not None:
            self._file.content.close()

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise bad_request(f"The form has too many parts: at most {MAX_PARTS} are accepted.")
        self._headers = {}
        self._gathered = bytearray()
        self._target = None

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header = self._value = b""

    def _end_headers(self) -> None:
        disposition, options = parse_options_header(self._headers.get(b"content-disposition"))
        if disposition != b"form-data" or not options.get(b"name"):
            raise _malformed()
        self._name = options[b"name"].decode(errors="replace")
        self._count(len(self._name))
        if b"filename" in options:
            self._begin_file(options[b"filename"].decode(errors="replace")[:MAX_NAME_CHARS])

    def _begin_file(self, file_name: str) -> None:
        if self._name != FILE_FIELD:
            message = f"The form's file must be in the field '{FILE_FIELD}'."
            raise bad_request(message, self._name[:100], "invalid_value")
        if self._file is not None:
            raise bad_request("The form has more than one file.", FILE_FIELD, "invalid_value")
        self._target = tempfile.SpooledTemporaryFile(MAX_SPOOLED_BYTES)  # noqa: SIM115  closed with the form
        self._file = UploadedFile(file_name, self._target)

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._target is not None:
            self._target.write(memoryview(data)[start:end])
            self._num_file_bytes += end - start
            return
        self._count(end - start)
        self._gathered += data[start:end]

    def _count(self, num_bytes: int) -> None:
        self._num_field_bytes += num_bytes
        if self._num_field_bytes > MAX_FIELD_BYTES:
            raise too_large(MAX_FIELD_BYTES, "The form's fields are")

    def _end_part(self) -> None:
        if self._target is not None:
            return
        try:
            value = self._gathered.decode()
        except UnicodeDecodeError:
            name = self._name[:100]
            raise bad_request(
                f"Invalid value for '{name}': expected text in UTF-8.", name, "invalid_value"
            ) from None
        self._fields.setdefault(self._name, []).append(value)

    def _end(self) -> None:
        self._is_complete = True


def _malformed() -> ApiError:
    return bad_request("We could not parse the form of your request. (HINT: it must be multipart/form-data.)")
