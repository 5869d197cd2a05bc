"""Connections that are kept and used again: one exchange at a time on each, as many as are wanted at once."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from llmkit.client.response import Response
from llmkit.errors import ConfigError, ServerError

Piece = tuple[float, bytes]  # time.perf_counter() of its arrival, bytes


class Exchange(asyncio.Protocol):
    """A connection, and the response that it is reading. pieces: what has come of the body and was not taken yet."""

    def __init__(self) -> None:
        self.response, self.pieces = Response(), deque[Piece]()
        self.failure: Exception | None = None
        self._transport: asyncio.Transport | None = None
        self._news, self._end = asyncio.Event(), asyncio.Event()

    # ---- asyncio calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # asyncio's own type says less than it passes

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        try:
            self.pieces.extend((now, piece) for piece in self.response.feed(data))
        except ServerError as e:
            self.failure = e
        self._tell()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.response.end() and self.failure is None:
            self.failure = exc or ConnectionResetError("the server closed the connection before its answer was whole")
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        if self.response.done or self.failure is not None:
            self._end.set()

    # ---- the client calls these

    @property
    def idle(self) -> bool:
        """Fit for another request."""
        return self._transport is not None and not self._transport.is_closing() and self.failure is None

    def send(self, request: bytes) -> None:
        """Begin an exchange."""
        assert self._transport is not None
        self.response, self.failure = Response(), None
        self.pieces.clear()
        self._end.clear()
        self._transport.write(request)

    async def _more(self) -> None:
        self._news.clear()
        await self._news.wait()

    def _check(self) -> None:
        if isinstance(self.failure, ServerError):
            raise self.failure
        if self.failure is not None:
            raise ServerError(f"the connection broke: {self.failure}", "look at the server's log") from self.failure

    async def head(self) -> Response:
        """The response, once its status and headers are known."""
        while not self.response.status:
            self._check()
            await self._more()
        return self.response

    async def body(self) -> AsyncIterator[Piece]:
        """The pieces of the body as they come."""
        while True:
            while self.pieces:
                yield self.pieces.popleft()
            if self.response.done:
                return
            self._check()
            await self._more()

    async def whole(self) -> None:
        """Wait for the end of the body, leaving it in `pieces`: nothing is woken for a piece that nobody needs yet."""
        await self._end.wait()
        self._check()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class Connections:
    """Those to one server. url: http://host:port[/path] or https://…; what it ends in ("/", "/v1") makes no difference."""

    def __init__(self, url: str, connect_timeout: float = 10.0) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is not the address of a server", "such as http://localhost:8000")
        self.host, self.port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        self.path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        self.root = f"{parts.scheme}://{parts.netloc}{self.path}"
        self.authority, self.timeout = parts.netloc.rpartition("@")[2], connect_timeout
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._idle: list[Exchange] = []

    @asynccontextmanager
    async def exchange(self, request: bytes) -> AsyncIterator[Exchange]:
        """Send a request; its exchange, once the head of the answer is there. Left before the end, the connection is closed,
        which tells the server that nobody reads any more."""
        exchange = await self._begin(request)
        try:
            yield exchange
        finally:
            if exchange.response.keeps_alive and exchange.idle:
                self._idle.append(exchange)
            else:
                exchange.close()

    async def _begin(self, request: bytes) -> Exchange:
        """A kept connection that the server has closed meanwhile is no failure: the request goes out on another one."""
        while self._idle:
            exchange = self._idle.pop()
            if exchange.idle and await self._answered(exchange, request, first=False):
                return exchange
        exchange = await self._connect()
        await self._answered(exchange, request, first=True)
        return exchange

    @staticmethod
    async def _answered(exchange: Exchange, request: bytes, first: bool) -> bool:
        exchange.send(request)
        try:
            await exchange.head()
        except BaseException as e:
            exchange.close()
            if first or not isinstance(e, ServerError) or isinstance(exchange.failure, ServerError):
                raise
            return False
        return True

    async def _connect(self) -> Exchange:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.timeout):
                _, exchange = await loop.create_connection(Exchange, self.host, self.port, ssl=self._tls)
        except TimeoutError as e:
            raise ServerError(f"{self.root} did not answer within {self.timeout:g} s", "is that the right address?") from e
        except OSError as e:  # asyncio's own words for a refusal are of the tries it made
            why = "nobody listens there" if "Connect call failed" in str(e) else e.strerror or e
            raise ServerError(f"there is no server at {self.root}: {why}", "start one: llmkit serve MODEL") from e
        return exchange

    def close(self) -> None:
        """Close the kept ones."""
        while self._idle:
            self._idle.pop().close()
