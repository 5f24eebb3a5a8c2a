"""The URLs. Each route reads its input, calls one function, and leaves failures to server/middleware.py."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from engine.errors import EngineDeadError
from server.body import parse_body
from server.chat import complete_chat
from server.completions import complete_prompt
from server.disconnect import while_connected
from server.middleware import Traffic
from server.schema import ChatRequest, CompletionRequest
from server.serving import Serving
from server.transcription_form import Task
from server.transcriptions import transcribe
from server.upload import read_form

OWNER = "tympan"

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """A conversation's next turn."""
    body = await parse_body(request, ChatRequest, request.app.state.max_body_bytes)
    return await while_connected(request, complete_chat(_serving(request), body))


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    """The continuation of a raw prompt."""
    body = await parse_body(request, CompletionRequest, request.app.state.max_body_bytes)
    return await while_connected(request, complete_prompt(_serving(request), body))


@router.post("/v1/audio/transcriptions")
async def transcriptions(request: Request) -> Response:
    """A recording's words."""
    return await _transcribe(request, "transcribe")


@router.post("/v1/audio/translations")
async def translations(request: Request) -> Response:
    """A recording's words in English."""
    return await _transcribe(request, "translate")


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """All names under which the model is served."""
    return JSONResponse(
        {"object": "list", "data": [_model(request, name) for name in _serving(request).model_names]}
    )


@router.get("/v1/models/{name:path}")
async def retrieve_model(request: Request, name: str) -> Response:
    """One of them."""
    return JSONResponse(_model(request, _serving(request).model_name(name)))


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while the engine lives, 503 after. For liveness probes: load and draining do not matter."""
    return Response(status_code=200 if _is_alive(request) else 503)


@router.get("/ready")
async def ready(request: Request) -> Response:
    """200 while new requests are welcome, 503 otherwise. For load balancers."""
    traffic: Traffic = request.app.state.traffic
    return Response(status_code=200 if _is_alive(request) and not traffic.is_draining else 503)


async def _transcribe(request: Request, task: Task) -> Response:
    form = await read_form(request, request.app.state.max_upload_bytes, "file")
    return await while_connected(request, transcribe(request.app.state.transcriber, form, task))


def _serving(request: Request) -> Serving:
    serving: Serving = request.app.state.serving
    return serving


def _is_alive(request: Request) -> bool:
    try:
        _serving(request).engine.check_health()
    except EngineDeadError:
        return False
    return True


def _model(request: Request, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": request.app.state.started,
        "owned_by": OWNER,
        "max_model_len": _serving(request).engine.info.max_model_len,
    }
