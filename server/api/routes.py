"""The URLs. Each route reads its input, calls one function, and leaves failures to server/http/middleware.py."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from starlette.responses import JSONResponse, Response
from starlette.routing import Match
from starlette.types import Scope

from engine.errors import EngineDeadError, EngineRestartingError
from server.access.admission import Traffic
from server.api import files, tokenization
from server.api.answers import (
    ChatAnswer,
    CompletionAnswer,
    DetokenizeAnswer,
    FileAnswer,
    FileDeleted,
    FileList,
    LoadAnswer,
    ModelAnswer,
    ModelList,
    ResponseAnswer,
    TokenizeAnswer,
    TranscriptionAnswer,
    TranslationAnswer,
    VersionAnswer,
)
from server.api.chat import complete_chat
from server.api.completions import complete_prompt
from server.api.openapi import EVENTS, TEXT, describe
from server.api.responses import create_response
from server.api.tokenization import DetokenizeRequest, TokenizeRequest
from server.api.transcriptions import transcribe
from server.errors import ApiError, to_api_error
from server.generation.serving import Serving
from server.http.body import parse_body
from server.http.disconnect import while_connected
from server.http.multipart import read_form
from server.observe.metrics import OPENMETRICS, Metrics
from server.requests.schema import ChatRequest, CompletionRequest
from server.responses.schema import ResponsesRequest
from server.transcription.form import TranscriptionForm, TranslationForm
from server.transcription.transcriber import Transcriber
from server.version import VERSION

OWNER = "tympan"

router = APIRouter()

_TOKENIZE = describe(body=TokenizeRequest, answer=TokenizeAnswer, errors=(404,))
_DETOKENIZE = describe(body=DetokenizeRequest, answer=DetokenizeAnswer, errors=(404,))


@router.post(
    "/v1/chat/completions",
    openapi_extra=describe(body=ChatRequest, answer=ChatAnswer, media_types=(EVENTS,), errors=(404,)),
)
async def chat_completions(request: Request) -> Response:
    """A conversation's next turn."""
    body = await parse_body(request, ChatRequest, request.app.state.max_body_bytes)
    return await while_connected(request, complete_chat(_serving(request), body))


@router.post(
    "/v1/responses",
    openapi_extra=describe(body=ResponsesRequest, answer=ResponseAnswer, media_types=(EVENTS,), errors=(404,)),
)
async def responses(request: Request) -> Response:
    """A conversation's next turn, in the shape of OpenAI's newer API."""
    body = await parse_body(request, ResponsesRequest, request.app.state.max_body_bytes)
    return await while_connected(request, create_response(_serving(request), body))


@router.post(
    "/v1/completions",
    openapi_extra=describe(body=CompletionRequest, answer=CompletionAnswer, media_types=(EVENTS,), errors=(404,)),
)
async def completions(request: Request) -> Response:
    """The continuation of a raw prompt."""
    body = await parse_body(request, CompletionRequest, request.app.state.max_body_bytes)
    return await while_connected(request, complete_prompt(_serving(request), body))


@router.post(
    "/v1/audio/transcriptions",
    openapi_extra=describe(
        form=TranscriptionForm, answer=TranscriptionAnswer, media_types=(TEXT, EVENTS), errors=(404,)
    ),
)
async def transcriptions(request: Request) -> Response:
    """A recording's words."""
    return await _transcribe(request, TranscriptionForm)


@router.post(
    "/v1/audio/translations",
    openapi_extra=describe(form=TranslationForm, answer=TranslationAnswer, media_types=(TEXT,), errors=(404,)),
)
async def translations(request: Request) -> Response:
    """A recording's words in English."""
    return await _transcribe(request, TranslationForm)


@router.get("/v1/models", openapi_extra=describe(answer=ModelList))
async def list_models(request: Request) -> Response:
    """All names under which the model is served."""
    return JSONResponse(
        {"object": "list", "data": [_model(request, name) for name in _serving(request).model_names]}
    )


@router.get("/v1/models/{name:path}", openapi_extra=describe(answer=ModelAnswer, errors=(404,)))
async def retrieve_model(request: Request, name: str) -> Response:
    """One of them."""
    return JSONResponse(_model(request, _serving(request).model_name(name)))


@router.post("/v1/files", openapi_extra=describe(form=files.FileForm, answer=FileAnswer))
async def create_file(request: Request) -> Response:
    """Upload a clip, to be named by its id in requests."""
    return await files.create_file(_serving(request).media, request, request.app.state.max_body_bytes)


@router.get("/v1/files", openapi_extra=describe(query=files.FileQuery, answer=FileList, errors=(404,)))
async def list_files(request: Request) -> Response:
    """The clips that the caller has uploaded."""
    return files.list_files(_serving(request).media, request)


@router.get("/v1/files/{file_id}", openapi_extra=describe(answer=FileAnswer, errors=(404,)))
async def retrieve_file(request: Request, file_id: str) -> Response:
    """What is known of one of them."""
    return files.retrieve_file(_serving(request).media, file_id)


@router.delete("/v1/files/{file_id}", openapi_extra=describe(answer=FileDeleted, errors=(404,)))
async def delete_file(request: Request, file_id: str) -> Response:
    """Forget one of them."""
    return files.delete_file(_serving(request).media, file_id)


@router.get("/v1/files/{file_id}/content", openapi_extra=describe(is_refused=True, errors=(400, 404)))
async def download_file(request: Request, file_id: str) -> Response:
    """Refused: uploads are not given out."""
    return files.refuse_content(_serving(request).media, file_id)


@router.post("/tokenize", openapi_extra=_TOKENIZE)
@router.post("/v1/tokenize", openapi_extra=_TOKENIZE)
async def tokenize(request: Request) -> Response:
    """The tokens of a prompt or a conversation, clips included."""
    body = await parse_body(request, TokenizeRequest, request.app.state.max_body_bytes)
    return await while_connected(request, tokenization.tokenize(_serving(request), body))


@router.post("/detokenize", openapi_extra=_DETOKENIZE)
@router.post("/v1/detokenize", openapi_extra=_DETOKENIZE)
async def detokenize(request: Request) -> Response:
    """The text of tokens."""
    body = await parse_body(request, DetokenizeRequest, request.app.state.max_body_bytes)
    return await tokenization.detokenize(_serving(request), body)


@router.get("/openapi.json", openapi_extra=describe(media_types=("application/json",)))
async def openapi_document(request: Request) -> Response:
    """This description of the API."""
    return JSONResponse(request.app.state.openapi)


@router.get("/metrics", openapi_extra=describe(media_types=(TEXT, OPENMETRICS)))
async def read_metrics(request: Request) -> Response:
    """Prometheus metrics."""
    metrics: Metrics = request.app.state.metrics
    text, content_type = await asyncio.to_thread(metrics.exposition, request.headers.get("accept", ""))
    return Response(text, headers={"Content-Type": content_type})


@router.get("/version", openapi_extra=describe(answer=VersionAnswer))
async def read_version() -> Response:
    """Of the server."""
    return JSONResponse({"version": VERSION})


@router.get("/load", openapi_extra=describe(answer=LoadAnswer))
async def read_load(request: Request) -> Response:
    """How many requests are under way, this one aside."""
    return JSONResponse({"server_load": request.app.state.traffic.num_in_flight - 1})


@router.get("/health", openapi_extra=describe(is_open=True))
async def health(request: Request) -> Response:
    """503 when the engine has died for good. For liveness probes: load, draining and a restart do not matter."""
    try:
        request.app.state.serving.engine.check_health()
    except EngineDeadError as error:
        return Response(status_code=200 if isinstance(error, EngineRestartingError) else 503)
    return Response(status_code=200)


@router.get("/ready", openapi_extra=describe(is_open=True))
async def ready(request: Request) -> Response:
    """200 while new requests are welcome, 503 otherwise. For load balancers."""
    traffic: Traffic = request.app.state.traffic
    try:
        traffic.check_welcome()
        request.app.state.serving.engine.check_health()
    except (ApiError, EngineDeadError) as error:
        return Response(status_code=503, headers={"Retry-After": to_api_error(error).headers["Retry-After"]})
    return Response(status_code=200)


def allowed_methods(scope: Scope) -> list[str]:
    """All that a URL of the API takes: the framework names those of one route only."""
    routes = [route for route in router.routes if isinstance(route, APIRoute)]
    fitting = [route.methods or set() for route in routes if route.matches(scope)[0] != Match.NONE]
    return sorted(set().union(*fitting))


UNKNOWN_ROUTE = "unknown"
_ROUTE_OF_PATH = {
    route.path: route.path for route in router.routes if isinstance(route, APIRoute) and "{" not in route.path
}
_PATTERNS = [route for route in router.routes if isinstance(route, APIRoute) and "{" in route.path]


def route_of(scope: Scope) -> str:
    """The route's template that a request is for, whatever its method; one word for all that there is none for."""
    if known := _ROUTE_OF_PATH.get(scope["path"]):
        return known
    return next((route.path for route in _PATTERNS if route.matches(scope)[0] != Match.NONE), UNKNOWN_ROUTE)


async def _transcribe(request: Request, model: type[TranscriptionForm]) -> Response:
    transcriber: Transcriber = replace(request.app.state.transcriber, serving=_serving(request))
    media = transcriber.serving.media
    media.quotas.check_audio(media.caller)
    form = await read_form(request, request.app.state.max_upload_bytes)
    return await while_connected(request, transcribe(transcriber, form, model))


def _serving(request: Request) -> Serving:
    """What serves this request, with its caller's uploads."""
    serving: Serving = request.app.state.serving
    return serving.of(request.state.caller).recorded_in(request.state.record, request.state.held)


def _model(request: Request, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": request.app.state.started,
        "owned_by": OWNER,
        "max_model_len": _serving(request).engine.info.max_model_len,
    }
