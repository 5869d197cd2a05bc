"""A front: HTTP and the text side of requests, in one event loop. No torch here.

The first ones answer before anything is loaded: who comes early is told to come again, instead of finding nobody. One that takes
the place of another answers when it can: until then there are the others, and the queue of the listening socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llmkit
from llmkit.errors import ConfigError
from llmkit.server.metrics.prometheus import Shared
from llmkit.server.processes.aside import aside
from llmkit.server.processes.link import EngineLink
from llmkit.server.processes.serve_options import Plan
from llmkit.server.processes.wire import Channel, Ready
from llmkit.server.shelf import AnyShelf, Shelf
from llmkit.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fastapi import FastAPI

LAST_WORDS = 2.0  # seconds that aborted requests have for their final event


class Door:
    """The ASGI app: the real one, once it is there; until then 503 with the stage of the start."""

    def __init__(self, link: EngineLink) -> None:
        self._link = link
        self.app: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self.app is not None:
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return
        stage = self._link.stage
        body = {"status": "unavailable", "stage": stage, "error": {
            "message": f"the server is starting ({stage}); ask again in a few seconds", "type": "service_unavailable_error",
            "param": None, "code": "service_unavailable"}}  # fmt: skip
        data = json.dumps(body).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode()), (b"retry-after", b"1")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": data})


class HttpFront:
    """Number `number` of `count` fronts that accept connections from one listening socket. numbers: their `Shared` file. shelf:
    what they keep; without one, this front's own."""

    def __init__(
        self, plan: Plan, listening: socket.socket, number: int = 0, count: int = 1, numbers: int | None = None,
        shelf: AnyShelf | None = None,
    ) -> None:  # fmt: skip
        self._plan, self._listening, self._began = plan, listening, time.time()
        self._shelf = shelf or Shelf()
        most = plan.server.max_queued_requests
        self.link = EngineLink(None if most is None else -(-most // count), number, count)
        self._numbers = None if numbers is None else Shared(numbers, number, count)
        self._door = Door(self.link)
        self._server: Any = None
        self._has_tokenizer = asyncio.Event()
        self.up = asyncio.Event()

    async def serve(self, early: bool = True) -> None:
        """Answer until `stop`. Everything that takes time is imported beside the loop. early: see the top of this file."""
        self._server = await aside(_uvicorn_server, self._door, self._plan)
        serving = asyncio.create_task(self._server.serve(sockets=[self._listening])) if early else None
        self._door.app = await aside(self._create_app)
        await self._has_tokenizer.wait()
        self.up.set()
        await (serving or self._server.serve(sockets=[self._listening]))

    async def read_tokenizer(self, home: Path) -> None:
        """Read the tokenizer from its folder."""
        self.link.tokenizer = await aside(Tokenizer.from_folder, home, self._plan.engine.trust_remote_code)
        self._has_tokenizer.set()

    def connect_engine(self, channel: socket.socket, ready: Ready) -> None:
        """A ready engine."""
        self.link.connect(Channel(channel), ready)

    def lose_engine(self, why: str) -> None:
        """It died."""
        self.link.disconnect(why)

    async def stop(self, seconds: float) -> None:
        """Accept nothing more, give open requests so many seconds, then end them with what they have."""
        if self._server is None:
            return
        self._server.should_exit = True
        end = time.monotonic() + seconds
        while self.link.num_open and time.monotonic() < end:
            await asyncio.sleep(0.02)
        if self.link.num_open:
            self.link.end_all()
            end = time.monotonic() + LAST_WORDS
            while self._server.server_state.connections and time.monotonic() < end:
                await asyncio.sleep(0.02)
        self._server.force_exit = True

    def _create_app(self) -> FastAPI:
        from llmkit.server.app import create_app
        from llmkit.server.metrics.endpoint import Metrics
        from llmkit.server.metrics.metered import Metered

        app = create_app(Metered(self.link, Metrics(self._numbers)), self._plan.server, self._shelf)
        app.add_api_route("/server_info", self._info, methods=["GET"], summary="Engine, memory plan, counts")
        return app

    async def _info(self) -> dict[str, Any]:
        import dataclasses
        import os

        facts = dataclasses.asdict(self.link.facts) if self.link.info else {}
        return {"version": llmkit.__version__, "pid": os.getpid(), "seconds_up": time.time() - self._began,
                "healthy": self.link.healthy, "served_model_names": self._plan.names, "facts": facts,
                "stats": self.link.stats()} | self.link.info  # fmt: skip


def log_to_stderr(level: str) -> None:
    """llmkit's own log; the root logger is left to others."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("llmkit.server")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel("DEBUG" if level == "trace" else level.upper())


def _uvicorn_server(app: Door, plan: Plan) -> Any:
    import uvicorn

    class Server(uvicorn.Server):
        """Signals are the launcher's affair."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    s = plan.serving
    config = uvicorn.Config(
        app, lifespan="off", log_level=s.log_level, access_log=s.log_level in ("info", "debug", "trace"), server_header=False,
        timeout_keep_alive=int(s.keep_alive_timeout), ssl_keyfile=s.ssl_keyfile, ssl_certfile=s.ssl_certfile,
        ssl_ca_certs=s.ssl_ca_certs, ssl_cert_reqs=s.ssl_cert_reqs, ssl_keyfile_password=s.ssl_keyfile_password, ws="none",
    )  # fmt: skip
    try:
        config.load()
    except OSError as e:  # ssl.SSLError is one
        what = f"the certificate or its key cannot be used: {e}"
        raise ConfigError(what, "--ssl-certfile and --ssl-keyfile name .pem files") from e
    return Server(config)
