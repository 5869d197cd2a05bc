"""Who answers a batch: a server somewhere, or the very same endpoints in this process, without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from llmkit.client.openai import OpenAIClient, Reply, to_json
from llmkit.errors import ServerError

BUSY = (429, 502, 503, 504)  # statuses after which asking again may help
LONGEST_WAIT = 60.0  # seconds between two tries, whatever Retry-After says


class TooSlowError(ServerError):
    """A server works on a request for too long; asking again would only make it worse."""


class Answerer(Protocol):
    """Answers requests, `width` of them at once."""

    width: int

    async def ask(self, url: str, body: dict[str, Any]) -> Reply:
        """POST body to url. Raises ServerError when there is no answer."""
        ...

    async def alive(self) -> bool:
        """Whether there is somebody to ask."""
        ...


@dataclass
class Remote:
    """A server behind HTTP. tries: how often a busy or broken one is asked; pause: seconds after the first, doubled each time;
    timeout: seconds after which a silent one is not asked again."""

    client: OpenAIClient
    width: int = 64
    tries: int = 6
    pause: float = 1.0
    timeout: float = 1800.0

    async def ask(self, url: str, body: dict[str, Any]) -> Reply:
        for attempt in range(self.tries - 1):
            try:
                reply = await self._post(url, body)
            except TooSlowError:
                raise
            except ServerError:
                reply = None
            if reply is not None and reply.status not in BUSY:
                return reply
            await asyncio.sleep(self._wait(reply, attempt))
        return await self._post(url, body)

    async def _post(self, url: str, body: dict[str, Any]) -> Reply:
        try:
            async with asyncio.timeout(self.timeout):
                return await self.client.post(url, body)
        except TimeoutError as e:
            raise TooSlowError(f"no answer within {self.timeout:g} s", "--timeout SECONDS") from e

    async def alive(self) -> bool:
        try:
            return (await self.client.get("/v1/models")).status not in BUSY
        except ServerError:
            return False

    def _wait(self, reply: Reply | None, attempt: int) -> float:
        asked = (reply.headers if reply else {}).get("retry-after", "")
        return min(LONGEST_WAIT, float(asked) if asked.isdecimal() else self.pause * 2**attempt)


@dataclass
class Local:
    """The server's own application, called as uvicorn would call it: a line means exactly what it means to `llmkit serve`."""

    app: Any
    width: int

    async def ask(self, url: str, body: dict[str, Any]) -> Reply:
        data = to_json(body)
        head: list[MutableMapping[str, Any]] = []
        parts: list[bytes] = []
        inbox = asyncio.Queue[dict[str, Any]]()
        inbox.put_nowait({"type": "http.request", "body": data, "more_body": False})  # and no disconnect ever follows

        async def send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                head.append(message)
            else:
                parts.append(message.get("body", b""))

        try:
            await self.app(_scope(url, data), inbox.get, send)
        except Exception:
            if not head:  # Starlette answers 500 and then raises, for the log of a server; here the answer is the log
                raise
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in head[0].get("headers", [])}
        return Reply(head[0]["status"], headers, b"".join(parts))

    async def alive(self) -> bool:
        return True


def _scope(url: str, data: bytes) -> dict[str, Any]:
    headers = [(b"host", b"batch"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
    return {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": url, "raw_path": url.encode(), "query_string": b"", "root_path": "", "headers": headers,
            "client": ("127.0.0.1", 0), "server": ("127.0.0.1", 0), "state": {}}  # fmt: skip


@asynccontextmanager
async def lifespan(app: Any) -> AsyncIterator[None]:
    """Let an ASGI application start and stop."""
    inbox, outbox = asyncio.Queue[dict[str, Any]](), asyncio.Queue[Any]()
    running = asyncio.create_task(app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, inbox.get, outbox.put))
    await inbox.put({"type": "lifespan.startup"})
    started = await outbox.get()
    if started["type"] != "lifespan.startup.complete":
        await running
        raise ServerError(f"the endpoints did not start: {json.dumps(started)}")
    try:
        yield
    finally:
        await inbox.put({"type": "lifespan.shutdown"})
        await outbox.get()
        await running
