"""What every request passes on its way in, as plain ASGI: an id, a key, a limit to its size."""

from __future__ import annotations

import hashlib
import hmac
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmkit.server.http.errors import Body, HttpError, error_body, error_response

log = logging.getLogger("llmkit.server")
Forms = Mapping[str, Callable[[BaseException], Body]]  # beginning of a path -> its API's error object, where it is not OpenAI's
OPEN_PATHS = ("/health", "/ping", "/version", "/metrics", "/docs", "/openapi.json", "/", "/page/")  # no key is asked for these


class RequestIds:
    """Gives every request an id (the client's own `X-Request-Id` where it sent one), and a clean 500 to what nobody caught."""

    def __init__(self, app: ASGIApp, forms: Forms) -> None:
        self._app, self._forms = app, forms

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id = _clean_id(Headers(scope=scope).get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        names = ["X-Request-Id"] if _form(scope, self._forms) is error_body else ["X-Request-Id", "request-id"]  # Anthropic's
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                for name in names:
                    MutableHeaders(scope=message)[name] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if started:
                raise
            log.exception("request %s failed", request_id)
            await error_response(error, form=_form(scope, self._forms))(scope, receive, send_with_id)


def _clean_id(given: str | None) -> str:
    usable = given and len(given) <= 128 and given.isascii() and given.isprintable()
    return given if given and usable else uuid.uuid4().hex


class ApiKeys:
    """401 to requests without one of the keys, as `Authorization: Bearer KEY` or Anthropic's `x-api-key: KEY`."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], forms: Forms, open_paths: Iterable[str] = OPEN_PATHS) -> None:
        self._app, self._forms = app, forms
        self._digests = [_digest(key) for key in keys]
        self._open = tuple(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = scope["type"] == "http" and scope["method"] != "OPTIONS" and not self._is_open(_path(scope))
        if asked and not self._admits(Headers(scope=scope)):
            error = HttpError(401, "this server needs an API key, and none of its keys was sent",
                              "send the header Authorization: Bearer KEY", code="invalid_api_key")  # fmt: skip
            return await error_response(error, form=_form(scope, self._forms))(scope, receive, send)
        await self._app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return any(path == p or (len(p) > 1 and p.endswith("/") and path.startswith(p)) for p in self._open)

    def _admits(self, headers: Headers) -> bool:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = [_digest(k) for k in (bearer.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", "")) if k]
        # digests have one length and every key is compared, so the time taken says nothing of a key
        return sum(hmac.compare_digest(g, known) for g in given for known in self._digests) > 0


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _path(scope: Scope) -> str:
    path, root = scope["path"], (scope.get("root_path") or "").rstrip("/")
    return path[len(root) :] or "/" if path == root or path.startswith(f"{root}/") else path


def _form(scope: Scope, forms: Forms) -> Callable[[BaseException], Body]:
    return next((form for begin, form in forms.items() if _path(scope).startswith(begin)), error_body)


class BodyLimit:
    """413 to bodies of more than `max_bytes`, whether they tell their length or not."""

    def __init__(self, app: ASGIApp, max_bytes: int, forms: Forms) -> None:
        self._app, self._max, self._forms = app, max_bytes, forms

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        told = Headers(scope=scope).get("content-length", "")
        if told.isdigit() and len(told) < 20 and int(told) > self._max:
            refusal = error_response(self._too_large(told), form=_form(scope, self._forms))
            return await refusal(scope, receive, send)
        count = 0

        async def receive_counting() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > self._max:
                raise HTTPException(413, self._too_large("more").message)  # the one exception that FastAPI passes on as it is
            return message

        await self._app(scope, receive_counting, send)

    def _too_large(self, size: Any) -> HttpError:
        return HttpError(413, f"the request body has {size} bytes; this server takes at most {self._max}")
