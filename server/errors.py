"""What a client is told when a request fails: one tree, one status table, one envelope.

Exception
├── ApiError           the client's fault, found by the server; carries its own status
├── audio.AudioError   a clip that cannot be fetched, decoded or accepted    -> 400, by media
├── RequestError       this request failed inside the engine                 -> 500
├── TimeLimitError     this request took longer than --request-timeout       -> 504
├── EngineDeadError    the engine is gone, and every request with it         -> 503
├── HTTPException      the framework's: unknown route, wrong method          -> 404, 405
└── anything else      our bug: logged with its traceback, told without      -> 500

The envelope is OpenAI's, always with its four keys. Messages never hold what the client sent beyond short,
bounded extracts, and nothing of the machine: no paths, addresses or tracebacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from engine.errors import EngineClosedError, EngineDeadError, RequestError, TimeLimitError

INVALID_REQUEST = "invalid_request_error"
RATE_LIMIT = "rate_limit_error"
SERVER_ERROR = "server_error"
UNAVAILABLE = "service_unavailable_error"

ENGINE_RETRY_AFTER_SECONDS = 5
"""About what a small checkpoint takes to be loaded again."""

BUG_MESSAGE = "The server had an error while processing your request."


@dataclass(eq=False)
class ApiError(Exception):
    """A request that gets an error answer, with all that the answer says."""

    status: int
    message: str
    type: str = INVALID_REQUEST
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def envelope(self) -> dict[str, dict[str, str | None]]:
        """The error as OpenAI writes it, in bodies and in streams alike."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole HTTP answer."""
        return JSONResponse(self.envelope(), self.status, self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400 that names the parameter."""
    return ApiError(400, message, param=param, code=code)


def shutting_down() -> ApiError:
    """A 503 that sends the client elsewhere."""
    headers = {"Retry-After": "1", "Connection": "close"}
    return ApiError(503, "The server is shutting down.", UNAVAILABLE, code="shutting_down", headers=headers)


def to_api_error(error: BaseException) -> ApiError:
    """The status table: what the client is told about any failure."""
    match error:
        case ApiError():
            return error
        case RequestError():
            return ApiError(500, str(error) or BUG_MESSAGE, SERVER_ERROR)
        case TimeLimitError():
            headers = {"x-should-retry": "false"}  # OpenAI's clients would have it computed twice more
            return ApiError(504, str(error), SERVER_ERROR, code="request_timeout", headers=headers)
        case EngineClosedError():
            return shutting_down()
        case EngineDeadError():
            headers = {"Retry-After": str(ENGINE_RETRY_AFTER_SECONDS)}
            return ApiError(
                503, "The engine is not available.", UNAVAILABLE, code="engine_unavailable", headers=headers
            )
        case HTTPException(status_code=404):
            return ApiError(404, "Unknown request URL.")
        case HTTPException(status_code=405):
            return ApiError(405, "This method is not allowed on this URL.", headers=error.headers or {})
        case HTTPException(status_code=status) if status < 500:
            return ApiError(status, "The request was refused.")
        case _:
            return ApiError(500, BUG_MESSAGE, SERVER_ERROR)
