"""Format all errors as OpenAI does: {"error": {"message", "type", "param", "code"}}; at /v1/messages as Anthropic."""

import logging
import re
import traceback
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

_LOG = logging.getLogger(__name__)
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
# Codes by which Anthropic's client decides how it goes on.
_DETAILS = frozenset({"thread_unsupported_request"})
_ANTHROPIC_PATH = re.compile(r"(/v1)*/messages(/.*)?")
# Headers of an error that is over soon: the queue is full, or the model is not ready.
RETRY_SOON = {"Retry-After": "1"}
_MOST_CHARS, _MOST_PARAM_CHARS = 1000, 100
# pydantic's names of a union's alternatives, which are no places in a request.
_WAY = re.compile(r"str|(list|function-\w+|constrained-\w+|nullable)\[.*")
_CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large", 429: "queue_full"}


class ApiError(Exception):
    """An error that is sent as the answer.

    Args:
        status: HTTP status.
        message: what is wrong and what to do; may name fields, must not repeat prompts or keys.
        param: the field at fault. code: a short name for programs.
        headers: more headers (Retry-After).
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        # Messages quote names and numbers of the request, which may be of any length.
        self.status, self.message, self.headers = status, _shortened(message, _MOST_CHARS), headers
        self.param = None if param is None else _shortened(param, _MOST_PARAM_CHARS)
        self.code = code or _CODES.get(status)

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object to send, as an answer or inside a stream."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def anthropic_body(self) -> dict[str, Any]:
        """The same for Anthropic's clients."""
        kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error")
        details = {"details": {"error_code": self.code}} if self.code in _DETAILS else {}
        return {"type": "error", "error": {"type": kind, "message": self.message, **details}}

    def response(self, path: str) -> JSONResponse:
        """The HTTP response to a request for `path`."""
        is_anthropic = _ANTHROPIC_PATH.fullmatch(path) is not None
        return JSONResponse(self.anthropic_body if is_anthropic else self.body, self.status, self.headers)


def not_possible(param: str, message: str) -> ApiError:
    """Make a 400: `param` has a value that cannot be served, as `message` says."""
    return ApiError(400, message, param=param, code="invalid_value")


def not_supported(param: str, message: str) -> ApiError:
    """Make a 400 with `message`: other servers know `param`, and it would change the output here if it were obeyed."""
    return ApiError(400, message, param=param, code="unsupported_parameter")


def internal(error: BaseException) -> ApiError:
    """Make a 500, and log the error by place and type only: an exception's text may quote a prompt."""
    places = traceback.extract_tb(error.__traceback__)
    where = "; ".join(f"{place.filename}:{place.lineno} {place.name}" for place in places[-6:])
    _LOG.error("%s in a request, at %s", type(error).__name__, where)
    return ApiError(500, f"The server failed ({type(error).__name__}). Its log says where.", code="internal_error")


def add_handlers(app: FastAPI) -> None:
    """Send every error of the app in OpenAI's format."""

    async def api_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response(request.url.path)

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        messages = {
            404: f"There is no {request.url.path} here. See /openapi.json.",
            405: f"{request.url.path} cannot be asked by {request.method}.",
        }
        message = messages.get(error.status_code, str(error.detail))
        headers = dict(error.headers) if error.headers else None
        return ApiError(error.status_code, message, headers=headers).response(request.url.path)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return from_validation(error.errors()).response(request.url.path)

    async def failed(request: Request, error: Exception) -> JSONResponse:
        return internal(error).response(request.url.path)

    app.add_exception_handler(Exception, failed)
    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, invalid)


def from_validation(errors: Any) -> ApiError:
    """Make a 400 from pydantic's first finding: where it is, and what is wrong."""
    # A value with several allowed forms is wrong in each of them: report the form that matched furthest.
    field = _place(errors[0])[:1]
    first = max((error for error in errors if _place(error)[:1] == field), key=_how_far)
    param = ".".join(_place(first)) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"There is no field {param!r}. Leave it out.", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{param or 'The body'} is missing.", param=param, code="missing_required_parameter")
    return ApiError(400, f"{param or 'The body'}: {first['msg']}.", param=param, code="invalid_value")


def _how_far(error: Any) -> tuple[int, list[int]]:
    return len(_place(error)), [part for part in error["loc"] if isinstance(part, int)]


def _place(error: Any) -> list[str]:
    """The place in the request: names of fields, and positions in lists."""
    *outer, last = [str(part) for part in error["loc"] if part != "body"] or [""]
    # An unknown field may have any name.
    is_name = error["type"] == "extra_forbidden"
    return [part for part in outer if not _WAY.fullmatch(part)] + (
        [last] if is_name or not _WAY.fullmatch(last) else []
    )


def _shortened(text: str, most_chars: int) -> str:
    return text if len(text) <= most_chars else f"{text[:most_chars]} ..."
