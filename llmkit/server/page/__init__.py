"""The chat page at `/`: a few files beside this one, with no CDN, framework or build; it speaks the public API as anyone does.

Read in this order: index.html, chat.js (what happens), answer.js (one streamed answer), markdown.js (text to nodes), words.js.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, HTTPException
from starlette.responses import Response

from llmkit.server.engine_client import EngineClient
from llmkit.server.options import ServerOptions

FOLDER = Path(__file__).parent
KINDS = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
HEADERS = {  # scripts and styles of this server only, requests to this server only; so what a model says can reach nobody
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
                               "base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # the page of another version would speak to this one
}  # fmt: skip


def router(engine: EngineClient, options: ServerOptions) -> APIRouter:
    """`/` and `/page/NAME`; nothing when it is switched off. Addresses in the page are relative, so that any proxy will do."""
    routes = APIRouter(include_in_schema=False)
    if not options.enable_page:
        return routes
    files = {path.name: path for path in FOLDER.iterdir() if path.suffix in KINDS}

    @routes.api_route("/", methods=["GET", "HEAD"])
    async def index() -> Response:
        return _file(files["index.html"])

    @routes.api_route("/page/{name}", methods=["GET", "HEAD"])
    async def part(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, f"the page has no file {name!r}")
        return _file(files[name])

    return routes


def _file(path: Path) -> Response:
    return Response(path.read_bytes(), media_type=KINDS[path.suffix], headers=HEADERS)
