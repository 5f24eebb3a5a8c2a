"""From a multipart/form-data body to its fields and its file, in bounded memory.

Starlette's streaming parser does the reading. The body is counted while it arrives; a file beyond a megabyte goes
to a temporary file without a name, which the system removes whatever happens. Knows nothing of what fields mean.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import BinaryIO

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from server.body import check_declared_length, too_large
from server.errors import ApiError, bad_request

MAX_FIELDS = 100
MAX_FIELD_BYTES = 1 << 16
"""Of one field that is no file."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a body held. Whoever has it closes `file`."""

    fields: dict[str, list[str]]
    """The values of each field, in order; `name[]` is listed as it was sent."""
    file: BinaryIO

    def close(self) -> None:
        """Remove the upload. Closing twice is no error."""
        self.file.close()


async def read_form(request: Request, max_bytes: int, file_field: str) -> Form:
    """Read a form that has one file, in `file_field`.

    Raises ApiError: 413 above `max_bytes`, 415 for another content type, 400 for what is malformed or missing.
    """
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        raise ApiError(415, "The Content-Type header must be multipart/form-data.")
    check_declared_length(request, max_bytes)
    parser = MultiPartParser(
        request.headers,
        _counted(request, max_bytes),
        max_files=1,
        max_fields=MAX_FIELDS,
        max_part_size=MAX_FIELD_BYTES,
    )
    try:
        items = (await parser.parse()).multi_items()
    except MultiPartException as error:
        raise _malformed(error) from None
    fields: dict[str, list[str]] = {}
    file: UploadFile | None = None
    for name, value in items:
        if isinstance(value, str):
            fields.setdefault(name, []).append(value)
        elif name == file_field:
            file = value
        else:
            value.file.close()
            raise bad_request("The file must be in the field 'file'.", file_field, "missing_required_parameter")
    if file is None:
        what = "must be a file, not text" if file_field in fields else "is missing"
        message = f"Missing required parameter: '{file_field}' {what}."
        raise bad_request(message, file_field, "missing_required_parameter")
    return Form(fields, file.file)


async def _counted(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise too_large(max_bytes)
        yield chunk


def _malformed(error: MultiPartException) -> ApiError:
    """The parser's own words are fixed texts with our limits in them."""
    if "Too many files" in error.message:
        return bad_request("Only one file can be sent.", "file", "invalid_value")
    if "maximum size" in error.message:
        return ApiError(413, f"A form field is longer than {MAX_FIELD_BYTES} bytes.", code="request_too_large")
    return bad_request(f"We could not parse the form of your request. (HINT: {error.message})")
