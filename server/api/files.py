"""/v1/files, as far as clips need it: upload one, list, look at, delete. What was uploaded is never given out again.

A file is decoded when it is uploaded, so that what is wrong with it is told at once; what is kept of it is
server/media/store.py's business.
"""

from __future__ import annotations

import asyncio
import math
import os
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from audio import AudioFile
from server.errors import RATE_LIMIT, ApiError, bad_request
from server.http.body import parse_text_values
from server.http.multipart import read_form
from server.media.loader import MediaLoader, check_audible
from server.media.store import ClipTooLargeError, StoredAudio, StoreFullError
from server.requests.schema import MAX_COUNT
from server.requests.strict_model import StrictModel

PURPOSE = "user_data"
MAX_LISTED = 10_000


class FileForm(StrictModel):
    """POST /v1/files, the file aside."""

    purpose: Literal["user_data"]
    anchor: Annotated[Literal["created_at"] | None, Field(alias="expires_after[anchor]")] = None
    seconds: Annotated[int | None, Field(alias="expires_after[seconds]", ge=1, le=MAX_COUNT)] = None


class FileQuery(StrictModel):
    """GET /v1/files."""

    after: str | None = None
    """The last id of the page before."""
    limit: Annotated[int, Field(ge=1, le=MAX_LISTED)] = MAX_LISTED
    order: Literal["asc", "desc"] = "desc"
    purpose: str | None = None


async def create_file(media: MediaLoader, request: Request, max_bytes: int) -> Response:
    """Read, decode and keep a clip. Raises ApiError."""
    media.quotas.check_audio(media.caller)
    with await read_form(request, max_bytes) as form:
        fields = parse_text_values(FileForm, {name: values[-1] for name, values in form.fields.items()})
        ttl_s = media.store.ttl_s
        if fields.seconds is not None and fields.seconds > ttl_s:
            message = f"Invalid 'expires_after[seconds]': this server keeps audio for at most {ttl_s:g} s."
            raise bad_request(message, "expires_after[seconds]", "integer_above_max_value")
        pcm = await media.read(AudioFile(form.file.content), "file")
        num_bytes = form.file.content.seek(0, os.SEEK_END)
    media.quotas.charge_audio(media.caller, pcm.duration_s)
    check_audible(pcm.num_samples, "file")
    try:
        audio = media.store.put(media.caller, pcm, form.file.name, num_bytes, fields.seconds)
    except ClipTooLargeError:
        message = "The audio is too large to be kept: decoded, it takes more memory than one caller has."
        raise ApiError(413, message, param="file", code="audio_too_large") from None
    except StoreFullError as full:
        message = "There is no room for more audio: delete some (DELETE /v1/files/{id}) or wait until some expires."
        headers = {"Retry-After": str(max(1, math.ceil(full.retry_after_s)))}
        raise ApiError(429, message, RATE_LIMIT, "file", "audio_store_full", headers) from None
    asyncio.get_running_loop().call_later(audio.expires_at - audio.created_at, media.store.drop_expired)
    return JSONResponse(_file(audio))


def list_files(media: MediaLoader, request: Request) -> Response:
    """The caller's clips, a page at a time. Raises ApiError."""
    query = parse_text_values(FileQuery, dict(request.query_params))
    files = media.store.list(media.caller)
    if query.order == "desc":
        files.reverse()
    if query.purpose not in (None, PURPOSE):
        files = []
    if query.after is not None:
        ids = [audio.audio_id for audio in files]
        if query.after not in ids:
            raise _not_found(query.after, "after")
        files = files[ids.index(query.after) + 1 :]
    page = files[: query.limit]
    return JSONResponse(
        {
            "object": "list",
            "data": [_file(audio) for audio in page],
            "first_id": page[0].audio_id if page else None,
            "last_id": page[-1].audio_id if page else None,
            "has_more": len(page) < len(files),
        }
    )


def retrieve_file(media: MediaLoader, file_id: str) -> Response:
    """One of them. Raises ApiError (404)."""
    audio = media.store.get(media.caller, file_id)
    if audio is None:
        raise _not_found(file_id, "file_id")
    return JSONResponse(_file(audio))


def delete_file(media: MediaLoader, file_id: str) -> Response:
    """Forget one. Raises ApiError (404)."""
    if not media.store.delete(media.caller, file_id):
        raise _not_found(file_id, "file_id")
    return JSONResponse({"id": file_id, "object": "file", "deleted": True})


def refuse_content(media: MediaLoader, file_id: str) -> Response:
    """What was uploaded is not given out. Raises ApiError, always."""
    retrieve_file(media, file_id)
    message = f"Files of purpose '{PURPOSE}' cannot be downloaded: only their samples are kept."
    raise bad_request(message, "file_id", "unsupported_value")


def _not_found(file_id: str, param: str) -> ApiError:
    message = f"No such File object: {file_id[:100]}. It is unknown, expired or not yours."
    return ApiError(404, message, param=param, code="file_not_found")


def _file(audio: StoredAudio) -> dict[str, Any]:
    return {
        "id": audio.audio_id,
        "object": "file",
        "bytes": audio.num_bytes,
        "created_at": int(audio.created_at),
        "expires_at": int(audio.expires_at),
        "filename": audio.file_name,
        "purpose": PURPOSE,
        "status": "processed",
    }
