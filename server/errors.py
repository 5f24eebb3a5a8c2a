"""What a client is told when a request fails: one tree, one status table, one envelope.

Exception
├── ApiError           the client's fault, found by the server; carries its own status
├── audio.AudioError   a clip that cannot be fetched, decoded or accepted    -> 400, by media
├── RequestError       this request failed inside the engine                 -> 500
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

from engine.errors import EngineDeadError, RequestError

INVALID_REQUEST = "invalid_request_error"
RATE_LIMIT = "rate_limit_error"
SERVER_ERROR = "server_error"
UNAVAILABLE = "service_unavailable_error"

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


def to_api_error(error: BaseException) -> ApiError:
    """The status table: what the client is told about any failure."""
    match error:
        case ApiError():
            return error
        case RequestError():
            return ApiError(500, str(error) or BUG_MESSAGE, SERVER_ERROR)
        case EngineDeadError():
            return ApiError(503, "The engine is not available.", UNAVAILABLE, code="engine_unavailable")
        case HTTPException(status_code=404):
            return ApiError(404, "Unknown request URL.")
        case HTTPException(status_code=405):
            return ApiError(405, "This method is not allowed on this URL.", headers=error.headers or {})
        case HTTPException(status_code=status) if status < 500:
            return ApiError(status, "The request was refused.")
        case _:
            return ApiError(500, BUG_MESSAGE, SERVER_ERROR)
