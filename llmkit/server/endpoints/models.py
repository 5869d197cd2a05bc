"""GET /v1/models, /version, /health, /ping: what is here, and whether it works."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

import llmkit
from llmkit.server.engine_client import EngineClient
from llmkit.server.http.errors import JsonResponse
from llmkit.server.http.protocol import Model, RequestBody
from llmkit.server.options import ServerOptions
from llmkit.server.served import Served


def router(engine: EngineClient, options: ServerOptions) -> APIRouter:
    """The routes that only look."""
    served, routes = Served(engine, options), APIRouter(tags=["server"])

    def model(name: str) -> dict[str, object]:
        facts = served.facts
        return Model(id=name, created=served.since, root=facts.model, max_model_len=facts.max_model_len).model_dump()

    @routes.get("/v1/models", summary="The names this server answers to", response_model=None)
    async def list_models() -> Response:
        served.check(RequestBody(model=None))
        return JsonResponse({"object": "list", "data": [model(name) for name in served.names]})

    @routes.get("/v1/models/{name:path}", summary="One of them", response_model=None)
    async def show_model(name: str) -> Response:
        return JsonResponse(model(served.check(RequestBody.model_construct(model=name))))

    @routes.get("/version", summary="llmkit's version", response_model=None)
    async def version() -> Response:
        return JsonResponse({"version": llmkit.__version__})

    @routes.get("/health", summary="200 when ready, 503 with the stage while not", response_model=None)
    async def health() -> Response:
        if engine.healthy:
            return JsonResponse({"status": "ok"})
        state = {"status": "unavailable", "stage": getattr(engine, "stage", None)}
        return JsonResponse(state, 503, {"Retry-After": str(options.retry_after)})

    @routes.api_route("/ping", methods=["GET", "POST"], summary="The same, by SageMaker's name", response_model=None,
                      operation_id="ping", include_in_schema=False)  # fmt: skip
    async def ping() -> Response:
        return await health()

    return routes
