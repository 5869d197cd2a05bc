"""Every refusal as OpenAI writes it: {"error": {"message", "type", "param", "code"}} with the right status, and no traceback."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from llmkit.errors import (
    ConfigError,
    EngineClosedError,
    EngineUnavailableError,
    InvalidRequestError,
    LlmkitError,
    QueueFullError,
    TokenizerError,
)

log = logging.getLogger("llmkit.server")
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
          405: "invalid_request_error", 408: "timeout_error", 413: "request_too_large", 415: "invalid_request_error",
          429: "rate_limit_error", 503: "service_unavailable_error", 504: "timeout_error"}  # fmt: skip
_CODES = {413: "request_too_large", 415: "unsupported_media_type", 503: "service_unavailable", 504: "request_timeout"}
_ALTERNATIVES = ("str", "int", "float", "bool", "dict", "list")
Body = dict[str, Any]


class HttpError(LlmkitError):
    """A refusal that has a status of its own. code: OpenAI's word for it."""

    def __init__(self, status: int, message: str, hint: str | None = None, param: str | None = None, code: str | None = None):
        super().__init__(message, hint)
        self.status, self.param, self.code = status, param, code or _CODES.get(status)


def refuse(message: str, param: str | None = None, hint: str | None = None, code: str | None = None) -> HttpError:
    """A 400 that names the field at fault."""
    return HttpError(400, message, hint, param, code)


def as_http_error(error: BaseException) -> HttpError:
    """Any exception as what the client shall see of it."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, InvalidRequestError):
        return refuse(error.message, error.param, error.hint)
    if isinstance(error, (EngineUnavailableError, QueueFullError, EngineClosedError)):
        return HttpError(503, error.message, error.hint, code="queue_full" if isinstance(error, QueueFullError) else None)
    if isinstance(error, (TokenizerError, ConfigError)):
        return refuse(error.message, None, error.hint)
    if isinstance(error, TimeoutError):
        return HttpError(504, "the request took longer than this server allows", "ask for fewer tokens")
    if isinstance(error, RequestValidationError):
        return _of_validation(error)
    if isinstance(error, HTTPException):
        return HttpError(error.status_code, str(error.detail))
    if isinstance(error, LlmkitError):
        return HttpError(500, error.message, error.hint, code="engine_error")
    return HttpError(500, "the server failed; its log has the cause under this request's id", code="internal_error")


def error_body(error: BaseException) -> Body:
    """OpenAI's error object. The hint follows the message: clients show nothing else."""
    seen = as_http_error(error)
    text = f"{seen.message}; {seen.hint}" if seen.hint else seen.message
    return {"error": {"message": text, "type": _TYPES.get(seen.status, "server_error" if seen.status >= 500 else
                      "invalid_request_error"), "param": seen.param, "code": seen.code}}  # fmt: skip


def error_response(error: BaseException, retry_after: int = 5, form: Callable[[BaseException], Body] = error_body) -> Response:
    """The whole response. form: another API's error object (Anthropic's)."""
    seen = as_http_error(error)
    headers = {"Retry-After": str(retry_after)} if seen.status == 503 else {}
    if isinstance(error, HTTPException):
        headers |= dict(error.headers or {})
    if seen.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JsonResponse(form(error), seen.status, headers)


class JsonResponse(Response):
    """JSON as fast as it goes; NaN and infinities become null, as JSON has none."""

    media_type = "application/json"

    def __init__(self, content: Any, status_code: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(msgspec.json.encode(content), status_code, headers)


def install_error_handlers(app: FastAPI, retry_after: int, forms: Mapping[str, Callable[[BaseException], Body]]) -> None:
    """Answer every exception of a route. forms: beginning of a path -> its API's error object, where it is not OpenAI's."""

    async def handle(request: Request, error: Exception) -> Response:
        seen = as_http_error(error)
        if seen.status >= 500 and seen.status != 503:
            log.error("request %s failed", getattr(request.state, "request_id", "?"), exc_info=error)
        form = next((f for path, f in forms.items() if request.url.path.startswith(path)), error_body)
        return error_response(error, retry_after, form)

    for kind in (LlmkitError, TimeoutError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, handle)


def _of_validation(error: RequestValidationError) -> HttpError:
    """pydantic's first complaint, with the path of the field: messages[0].role."""
    first = error.errors()[0]
    param = _path(first["loc"][1:]) or None
    said = str(first["msg"])[:500]
    return refuse(f"{param}: {said[:1].lower()}{said[1:]}" if param else f"the request body: {said}", param)


def _path(loc: tuple[Any, ...]) -> str:
    """Of a union pydantic also tells the alternative (stop.str, stop.list[str]), which is no field."""
    parts = [f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc if p not in _ALTERNATIVES and "[" not in str(p)]
    return "".join(parts).removeprefix(".")[:200]
