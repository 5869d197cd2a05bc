"""`create_app`: all routes of the server over one engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse

import llmkit
from llmkit.server import page
from llmkit.server.endpoints import chat_completions, completions, embeddings, messages, models, responses, tokenize
from llmkit.server.engine_client import EngineClient
from llmkit.server.http.errors import Body, install_error_handlers
from llmkit.server.http.middleware import ApiKeys, BodyLimit, RequestIds
from llmkit.server.metrics import endpoint as metrics
from llmkit.server.metrics.metered import CountRequests, Metered
from llmkit.server.options import ServerOptions
from llmkit.server.shelf import AnyShelf, Shelf

ROUTERS: tuple[Callable[[EngineClient, ServerOptions], APIRouter], ...] = (
    models.router,
    chat_completions.router,
    completions.router,
    tokenize.router,
    embeddings.router,
    messages.router,
    metrics.router,
    page.router,
)
# Beginning of a path -> its API's error object, where that is not OpenAI's.
ERROR_FORMS: Mapping[str, Callable[[BaseException], Body]] = {"/v1/messages": messages.anthropic_error}


def create_app(engine: EngineClient, options: ServerOptions | None = None, shelf: AnyShelf | None = None) -> FastAPI:
    """The server's ASGI app. Nothing is asked of `engine` yet: it may still be starting. shelf: where responses are kept."""
    options = options or ServerOptions()
    metered = engine if isinstance(engine, Metered) else Metered(engine)
    app = FastAPI(
        title="llmkit", version=llmkit.__version__, root_path=options.root_path, docs_url=None, redoc_url=None,
        openapi_url="/openapi.json" if options.enable_docs else None, separate_input_output_schemas=False,
    )  # fmt: skip
    for router in (*ROUTERS, partial(responses.router, shelf=shelf or Shelf())):
        routes = router(metered, options)
        app.include_router(routes)
        metered.metrics.http.know(routes.routes)
    if options.enable_docs:
        _add_docs(app)
    install_error_handlers(app, options.retry_after, ERROR_FORMS)
    _add_middleware(app, options)
    app.add_middleware(CountRequests, metrics=metered.metrics)  # the outermost: it sees all, and when they came
    return app


def _add_middleware(app: FastAPI, options: ServerOptions) -> None:
    """The last one added is the first that a request meets."""
    app.add_middleware(BodyLimit, max_bytes=options.max_body_bytes, forms=ERROR_FORMS)
    if options.api_keys:
        app.add_middleware(ApiKeys, keys=options.api_keys, forms=ERROR_FORMS)
    app.add_middleware(RequestIds, forms=ERROR_FORMS)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=options.allowed_origins,
        allow_methods=options.allowed_methods,
        allow_headers=options.allowed_headers,
        allow_credentials=options.allow_credentials,
        expose_headers=["X-Request-Id", "Retry-After", "X-Llmkit-Ignored"],
    )


def _add_docs(app: FastAPI) -> None:
    """/docs without a CDN, and a schema that tells the truth: a wrong body is a 400 in OpenAI's form, never a 422."""
    page = (Path(__file__).parent / "docs.html").read_text(encoding="utf-8")
    plain_openapi = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _with_errors(plain_openapi())
        return app.openapi_schema

    app.openapi = openapi

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page)


def _with_errors(schema: dict[str, Any]) -> dict[str, Any]:
    components = schema.setdefault("components", {}).setdefault("schemas", {})
    text = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    fields = {"message": {"type": "string"}, "type": {"type": "string"}, "param": text, "code": text}
    inner = {"type": "object", "required": list(fields), "properties": fields}
    components["Error"] = {"type": "object", "required": ["error"], "properties": {"error": inner}}
    components["AnthropicError"] = messages.ERROR_SCHEMA
    for path, operations in schema["paths"].items():
        name = "AnthropicError" if path.startswith(tuple(ERROR_FORMS)) else "Error"
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = {"description": "An error, in the form of this API", "content": content}
    for name in ("HTTPValidationError", "ValidationError"):
        components.pop(name, None)
    return schema
