"""JSON bodies of strangers: depth, NaN, half characters and wrong content types are refused in words, never a crash."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import pydantic_core
from fastapi import HTTPException
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response


def parse_json(raw: bytes) -> Any:
    """The value of a body. Raises HTTPException 400: no JSON, nested too deeply, NaN, or lone surrogates."""
    try:
        return pydantic_core.from_json(raw, allow_inf_nan=False, cache_strings="none")
    except ValueError as e:
        raise HTTPException(400, f"the request body is not valid JSON: {str(e)[:200]}") from e


class JsonRequest(Request):
    """A request whose `json()` is `parse_json`."""

    async def json(self) -> Any:
        if not hasattr(self, "_parsed"):
            self._parsed = parse_json(await self.body())
        return self._parsed


class JsonRoute(APIRoute):
    """A route that reads its body by `JsonRequest`, and nothing but JSON: a form of a foreign page cannot post to it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            is_json = kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
            if self.body_field is not None and not is_json:
                raise HTTPException(415, f"content type {kind[:100]!r} is not read here: send application/json")
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json
