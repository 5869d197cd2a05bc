"""One shelf for several fronts: it lies with their launcher, and they ask for what is on it over the sockets they have anyway.

Every act is answered, so that a client that was told of a response finds it at any front.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from llmkit.server.processes.wire import EndRunning, Message, OnShelf, Told
from llmkit.server.shelf import Running, Shelf


class FarShelf:
    """The shelf, as a front sees it. send: to the launcher. See AnyShelf."""

    def __init__(self, send: Callable[[Message], None]) -> None:
        self._send = send
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[bytes | None]] = {}
        self._running: dict[str, Running] = {}  # what this front is making

    async def keep(self, key: str, data: bytes, running: Running | None = None) -> None:
        """See AnyShelf."""
        if running is not None:
            self._running[key] = running
        await self._ask("keep", key, data, running.otherwise if running else None)

    async def settle(self, key: str, data: bytes) -> None:
        """See AnyShelf."""
        self._running.pop(key, None)
        await self._ask("settle", key, data)

    async def fetch(self, key: str) -> bytes | None:
        """See AnyShelf."""
        return await self._ask("fetch", key)

    async def end(self, key: str) -> None:
        """See AnyShelf."""
        await self._ask("end", key)

    async def drop(self, key: str) -> None:
        """See AnyShelf."""
        await self._ask("drop", key)

    async def _ask(self, act: str, key: str, data: bytes | None = None, otherwise: bytes | None = None) -> bytes | None:
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        try:
            self._send(OnShelf(number, act, key, data, otherwise))
            return await answer
        finally:
            del self._asked[number]

    def hear(self, message: Told | EndRunning) -> None:
        """What the launcher says."""
        if isinstance(message, EndRunning):
            if (running := self._running.get(message.key)) is not None:
                running.end()
        elif (answer := self._asked.get(message.number)) is not None and not answer.done():
            answer.set_result(message.data)


class ShelfDesk:
    """Does for one front, at the launcher's, what that asks of the shelf. send: to the front."""

    def __init__(self, shelf: Shelf, send: Callable[[Message], None]) -> None:
        self._shelf, self._send = shelf, send
        self._running: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def hear(self, message: OnShelf) -> None:
        """Do it, in the order in which it was asked; only `end` has to wait."""
        task = asyncio.create_task(self._do(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _do(self, m: OnShelf) -> None:
        self._send(Told(m.number, await self._act(m)))

    async def _act(self, m: OnShelf) -> bytes | None:
        data = m.data or b""
        if m.act == "keep":
            await self._shelf.keep(m.key, data, self._remember(m))
        elif m.act == "settle":
            self._running.discard(m.key)
            await self._shelf.settle(m.key, data)
        elif m.act == "end":
            await self._shelf.end(m.key)
        elif m.act == "drop":
            await self._shelf.drop(m.key)
        else:
            return await self._shelf.fetch(m.key)
        return None

    def _remember(self, m: OnShelf) -> Running | None:
        if m.otherwise is None:
            return None
        self._running.add(m.key)
        return Running(lambda: self._send(EndRunning(m.key)), m.otherwise)

    async def close(self) -> None:
        """The front is gone, and what it was making."""
        for task in self._tasks:
            task.cancel()
        for key in self._running:
            await self._shelf.abandon(key)
