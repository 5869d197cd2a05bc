"""/v1/messages: Anthropic's API, over the same chat templates, tools and reasoning as /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from llmkit.server.endpoints.chat_completions import ChatCompletion
from llmkit.server.endpoints.message_input import NAMES, QUIET, SAMPLING, CountRequest, MessageRequest, chat_fields, conversation
from llmkit.server.endpoints.message_writer import MessageWriter
from llmkit.server.endpoints.translation import named_frame, new_id, pieces, prepare_chat, whole
from llmkit.server.engine_client import EngineClient
from llmkit.server.http.body import JsonRoute
from llmkit.server.http.errors import JsonResponse, as_http_error, error_body
from llmkit.server.http.params import unknown_fields
from llmkit.server.http.streaming import EventStream, answer
from llmkit.server.options import ServerOptions
from llmkit.server.served import Served

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
          408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
          504: "timeout_error"}  # fmt: skip
_STRING = {"type": "string"}
_INNER = {"type": "object", "required": ["type", "message"], "properties": {"type": _STRING, "message": _STRING}}
ERROR_SCHEMA = {"type": "object", "required": ["type", "error"], "properties": {"type": {"const": "error"}, "error": _INNER}}


def router(engine: EngineClient, options: ServerOptions) -> APIRouter:
    """The routes of /v1/messages."""
    served = Served(engine, options)
    routes = APIRouter(route_class=JsonRoute, tags=["messages"], prefix="/v1/messages")

    @routes.post("", summary="Answer a conversation, in Anthropic's form", response_model=None)
    async def create(request: Request, body: MessageRequest) -> Response:
        model, headers = served.check(body), unknown_fields(body, (*SAMPLING, *QUIET))
        job = await _prepare(served, model, body)
        if body.stream:
            return EventStream(_stream(job), options.keep_alive_interval, options.request_timeout, _error_frames, headers)
        message = await answer(request, _whole(job), options.request_timeout)
        return JsonResponse(message, headers=headers)

    @routes.post("/count_tokens", summary="Count what a message would read", response_model=None)
    async def count(body: CountRequest) -> Response:
        model, headers = served.check(body), unknown_fields(body, (*SAMPLING, *QUIET))
        job = await _prepare(served, model, body)
        return JsonResponse({"input_tokens": len(job.prompt.ids)}, headers=headers)

    return routes


async def _prepare(served: Served, model: str, body: CountRequest) -> ChatCompletion:
    return await prepare_chat(served, model, conversation(body), chat_fields(body), NAMES)


async def _whole(job: ChatCompletion) -> dict[str, Any]:
    writer = MessageWriter(_blank(job))
    events, output = await whole(job)
    writer.take(events)
    writer.finish(output)
    return writer.message


async def _stream(job: ChatCompletion) -> AsyncGenerator[bytes, None]:
    writer, begun = MessageWriter(_blank(job)), False
    async for events, chunk in pieces(job):
        output = chunk.output() if chunk.output and (chunk.finish_reason or not begun) else None
        data = writer.begin(output) if output and not begun else b""
        begun = True
        data += writer.take(events)
        if output and chunk.finish_reason:
            data += writer.finish(output)
        if data:
            yield data


def _blank(job: ChatCompletion) -> dict[str, Any]:
    """A message before its answer."""
    return {"id": new_id("msg"), "type": "message", "role": "assistant", "model": job.model, "content": [], "stop_reason": None,
            "stop_sequence": None, "usage": {}}  # fmt: skip


def anthropic_error(error: BaseException) -> dict[str, Any]:
    """Anthropic's error object."""
    seen = as_http_error(error)
    kind = _TYPES.get(seen.status, "api_error" if seen.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error_body(error)["error"]["message"]}}


def _error_frames(error: BaseException) -> bytes:
    """How a stream ends when it breaks."""
    return named_frame(anthropic_error(error))
