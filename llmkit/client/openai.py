"""What is said to an OpenAI server: JSON there, JSON or server-sent events back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any

import llmkit
from llmkit.client.connection import Connections, Exchange, Piece
from llmkit.errors import ServerError
from llmkit.interrupt import interrupt_afterwards

Event = dict[str, Any]  # the JSON of a server-sent event


class Reply:
    """A whole answer. body: its JSON, or its text when it is none. request_id: the server's name for the request, or ""."""

    def __init__(self, status: int, headers: dict[str, str], raw: bytes) -> None:
        self.status, self.headers = status, headers
        self.request_id = headers.get("x-request-id", "")
        try:
            self.body: Any = json.loads(raw)
        except ValueError:
            self.body = raw.decode("utf-8", "replace")

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    @property
    def message(self) -> str:
        """What an error says, in OpenAI's form, FastAPI's, or any other."""
        body = self.body
        error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
        text = error.get("message", error) if isinstance(error, dict) else error
        return str(text).strip()[:500] or f"HTTP {self.status}"


class OpenAIClient:
    """Speaks to one server. Every method belongs to one event loop; as many calls at once as wanted."""

    def __init__(self, url: str, api_key: str | None = None, connect_timeout: float = 10.0) -> None:
        self.connections = Connections(url, connect_timeout)
        self.url = self.connections.root
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._headers = f"Host: {self.connections.authority}\r\nUser-Agent: llmkit/{llmkit.__version__}\r\n{key}"

    def request(self, method: str, path: str, body: bytes = b"", stream: bool = False) -> bytes:
        """The bytes of a request; made beforehand, they cost nothing when they are sent."""
        accept = "text/event-stream" if stream else "application/json"
        what = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if method == "POST" else ""
        head = f"{method} {self.connections.path}{path} HTTP/1.1\r\n{self._headers}Accept: {accept}\r\n{what}\r\n"
        return head.encode("latin-1") + body

    def exchange(self, request: bytes) -> AbstractAsyncContextManager[Exchange]:
        """Send what `request` made. Raises ServerError when there is no answer."""
        return self.connections.exchange(request)

    async def get(self, path: str) -> Reply:
        """GET, such as /v1/models."""
        return await self._reply(self.request("GET", path))

    async def post(self, path: str, body: Any) -> Reply:
        """POST a JSON body; whatever the status."""
        return await self._reply(self.request("POST", path, to_json(body)))

    async def _reply(self, request: bytes) -> Reply:
        async with self.exchange(request) as exchange:
            await exchange.whole()
            response = exchange.response
            return Reply(response.status, response.headers, b"".join(data for _, data in exchange.pieces))

    async def events(self, path: str, body: Any) -> AsyncGenerator[Event, None]:
        """POST, and the JSON of each server-sent event. Raises ServerError for an error, at the beginning or in the middle.
        Closing it early closes the connection, and so ends the request."""
        async with self.exchange(self.request("POST", path, to_json(body), stream=True)) as exchange:
            response = exchange.response
            if response.status != 200:
                await exchange.whole()
                raise refused(Reply(response.status, response.headers, b"".join(data for _, data in exchange.pieces)))
            events = Events()
            async for _, data in exchange.body():
                for event in events.feed(data):
                    yield _checked(event)

    async def models(self) -> list[str]:
        """The names that the server answers to."""
        reply = await self.get("/v1/models")
        if not reply.ok or not isinstance(reply.body, dict):
            raise refused(reply)
        return [m["id"] for m in reply.body.get("data", [])]

    def close(self) -> None:
        self.connections.close()


class Events:
    """Server-sent events out of pieces that were cut anywhere."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Event]:
        """The events that are whole now; comments and `[DONE]` are none."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and (text := line[5:].strip()) not in (b"", b"[DONE]"):
                yield json.loads(text)


def timed_events(pieces: list[Piece]) -> Iterator[tuple[float, Event]]:
    """(arrival, event) of a whole body; an event arrives with its last byte."""
    events = Events()
    for when, data in pieces:
        for event in events.feed(data):
            yield when, event


def _checked(event: Event) -> Event:
    """Servers that fail in the middle of a stream say so in an event."""
    if error := event.get("error"):
        raise ServerError(str(error.get("message", error)) if isinstance(error, dict) else str(error))
    return event


def refused(reply: Reply) -> ServerError:
    """The error for a reply that is not what was asked for."""
    hints = {401: "give its key: --api-key KEY, or OPENAI_API_KEY", 403: "give its key: --api-key KEY, or OPENAI_API_KEY"}
    return ServerError(f"the server answered {reply.status}: {reply.message}", hints.get(reply.status))


def to_json(body: Any) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")


def in_sync(events: AsyncGenerator[Event, None], runner: asyncio.Runner) -> Generator[Event, None, None]:
    """The same events for code that is not async. An interrupt closes them and goes on as KeyboardInterrupt.

    The runner's own way with interrupts has moments when one leaves a task behind, or goes on as CancelledError.
    """
    task: asyncio.Task[Any] | None = None
    interrupted = False

    async def step() -> Event | None:
        nonlocal task
        task = asyncio.current_task()
        try:
            return None if interrupted else await anext(events, None)
        except asyncio.CancelledError:
            if not interrupted:
                raise
            return None

    def stop() -> None:
        nonlocal interrupted
        interrupted = True
        if task is not None:
            runner.get_loop().call_soon_threadsafe(task.cancel)

    async def leave() -> None:
        async with aclosing(events):
            return

    try:
        while True:
            with interrupt_afterwards(stop):
                event = runner.run(step())
            if event is None:
                return
            yield event
    finally:
        with interrupt_afterwards():
            runner.run(leave())
