"""Server-sent events: one task writes, one watches for the client to go, one keeps a silent line alive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llmkit.server.http.errors import HttpError, JsonResponse, as_http_error, error_body, log
from llmkit.server.options import ServerOptions

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
_COMMENT = b": keep-alive\n\n"


def frame(value: Any) -> bytes:
    """One event. NaN and infinities become null."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def error_frames(error: BaseException) -> bytes:
    """How an OpenAI stream ends when it breaks."""
    return frame(error_body(error)) + DONE


class EventStream(Response):
    """Sends what `frames` yields, and closes it whatever happens: its end, an error, the client's going, the server's stop.

    Nothing is sent before the first frame (or `keep_alive` seconds), so an early error still becomes a status; a later one is
    told by `on_error`. Frames wait for slow readers, who thereby hold up nobody else. timeout: seconds for the whole answer.
    """

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        keep_alive: float = 15.0,
        timeout: float | None = None,
        on_error: Callable[[BaseException], bytes] = error_frames,
        headers: dict[str, str] | None = None,
    ) -> None:
        self._frames, self._keep_alive, self._timeout, self._on_error = frames, keep_alive, timeout, on_error
        more = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})}
        super().__init__(None, 200, more, "text/event-stream")
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._frames):
            await unless_gone(self._write(send), receive)

    async def _write(self, send: Send) -> None:
        async with asyncio.timeout(self._timeout) as clock:
            head = await self._head()
            await self._start(send)
            beat = asyncio.create_task(self._beat(send))
            try:
                await self._send_all(head, send, clock)
            finally:
                await _stop(beat)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _head(self) -> asyncio.Task[bytes]:
        """The first frame's task; done, unless it takes too long to keep the client waiting for the headers."""
        first = asyncio.ensure_future(anext(self._frames))
        try:
            await asyncio.wait({first}, timeout=self._keep_alive)
        except asyncio.CancelledError:
            await _stop(first)
            raise
        if first.done():
            first.result()
        return first

    async def _start(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._spoke = asyncio.get_running_loop().time()

    async def _send_all(self, head: asyncio.Task[bytes], send: Send, clock: asyncio.Timeout) -> None:
        try:
            await self._send(await head, send)
            async for data in self._frames:
                await self._send(data, send)
        except asyncio.CancelledError:
            if not clock.expired():
                raise
            await self._send(self._on_error(TimeoutError()), send)
        except Exception as error:
            if as_http_error(error).status == 500:
                log.error("a stream broke", exc_info=error)
            await self._send(self._on_error(error), send)

    async def _send(self, data: bytes, send: Send) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": True})
        self._spoke = asyncio.get_running_loop().time()

    async def _beat(self, send: Send) -> None:
        """A comment, which clients skip, whenever nothing was said for a while."""
        now = asyncio.get_running_loop().time
        while True:
            silence = now() - self._spoke
            if silence >= self._keep_alive:
                await self._send(_COMMENT, send)
            await asyncio.sleep(max(0.01, self._keep_alive - silence))


async def _stop(task: asyncio.Future[Any]) -> None:
    task.cancel()
    await asyncio.wait({task})


async def unless_gone(work: Awaitable[T], receive: Receive) -> T | None:
    """The result of `work`; None, with the work cancelled and ended, once the client has gone."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        gone.cancel()
        if not task.done():
            await _stop(task)


async def _gone(receive: Receive) -> None:
    message = await receive()
    while message["type"] != "http.disconnect":
        message = await receive()


async def answer(request: Request, work: Awaitable[T], timeout: float | None) -> T:
    """The result of `work` for a client that waits for the whole; aborted with it (499, which nobody reads) or by the clock."""

    async def in_time() -> tuple[T]:
        async with asyncio.timeout(timeout):
            return (await work,)

    done = await unless_gone(in_time(), request.receive)
    if done is None:
        raise HttpError(499, "the client closed the connection", code="client_closed_request")
    return done[0]


class Answers(Protocol):
    """What a completion endpoint has prepared: its answer in one piece, or as frames."""

    def whole(self) -> Awaitable[Any]: ...

    def stream(self) -> AsyncGenerator[bytes]: ...


async def respond(
    request: Request, job: Answers, streaming: bool | None, options: ServerOptions, headers: dict[str, str]
) -> Response:
    """The answer as the client wants it."""
    if streaming:
        return EventStream(job.stream(), options.keep_alive_interval, options.request_timeout, headers=headers)
    return JsonResponse(await answer(request, job.whole(), options.request_timeout), headers=headers)


async def together(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, in order. When one fails or the caller is cancelled, the others are cancelled and have ended."""
    tasks = [asyncio.create_task(w) for w in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def merged(streams: Sequence[AsyncIterator[T]]) -> AsyncGenerator[tuple[int, T], None]:
    """(i, item) of all streams as they come. All are closed at the end, however it comes."""
    alone = len(streams) == 1  # the usual case needs no task for each item
    waiting = {} if alone else {asyncio.ensure_future(anext(s)): i for i, s in enumerate(streams)}
    try:
        if alone:
            async for item in streams[0]:
                yield 0, item
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                i = waiting.pop(task)
                if isinstance(task.exception(), StopAsyncIteration):
                    continue
                item = task.result()
                waiting[asyncio.ensure_future(anext(streams[i]))] = i
                yield i, item
    finally:
        for task in waiting:
            await _stop(task)
        for stream in streams:
            if close := getattr(stream, "aclose", None):
                await close()
