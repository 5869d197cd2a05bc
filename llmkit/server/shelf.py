"""What a server keeps of its answers, as bytes under a key: the newest, in memory only, gone with the server.

With one front it lies beside that; with several, with their launcher (`processes.far_shelf`), so that each finds what any of them
has made.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

MOST, MOST_BYTES = 1000, 64 * 1024 * 1024


@dataclass
class Running:
    """Of what is still being made. end: stops that, after which `settle` says what has become of it. otherwise: what is kept when
    who makes it is gone."""

    end: Callable[[], object]
    otherwise: bytes


class AnyShelf(Protocol):
    """A shelf, here or in another process."""

    async def keep(self, key: str, data: bytes, running: Running | None = None) -> None:
        """From now on, every front finds it."""
        ...

    async def settle(self, key: str, data: bytes) -> None:
        """What has become of what was running; dropped meanwhile, it stays so."""
        ...

    async def fetch(self, key: str) -> bytes | None:
        """What is kept; None when nothing is, or no longer."""
        ...

    async def end(self, key: str) -> None:
        """Stop what is still being made, and wait until it has settled."""
        ...

    async def drop(self, key: str) -> None:
        """Forget it, and stop what is still being made."""
        ...


@dataclass
class _Item:
    data: bytes
    running: Running | None
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    ending: bool = False

    def end(self) -> None:
        """Once: a task that is cancelled again could not say any more what has become of it."""
        if self.running is not None and not self.ending:
            self.ending = True
            self.running.end()

    def settle(self, data: bytes) -> None:
        self.data, self.running = data, None
        self.settled.set()


class Shelf:
    """Bounded by count and by bytes; what was not used for the longest time goes first, what is still being made stays."""

    def __init__(self, most: int = MOST, most_bytes: int = MOST_BYTES) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._items: OrderedDict[str, _Item] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._items)

    async def keep(self, key: str, data: bytes, running: Running | None = None) -> None:
        """See AnyShelf."""
        self._forget(key)
        self._items[key] = _Item(data, running)
        self._bytes += len(data)
        self._make_room(key)

    async def settle(self, key: str, data: bytes) -> None:
        """See AnyShelf."""
        item = self._items.get(key)
        if item is None:
            return
        self._bytes += len(data) - len(item.data)
        item.settle(data)
        self._items.move_to_end(key)
        self._make_room(key)

    async def fetch(self, key: str) -> bytes | None:
        """See AnyShelf."""
        item = self._items.get(key)
        if item is None:
            return None
        self._items.move_to_end(key)
        return item.data

    async def end(self, key: str) -> None:
        """See AnyShelf."""
        item = self._items.get(key)
        if item is not None and item.running is not None:
            item.end()
            await item.settled.wait()

    async def drop(self, key: str) -> None:
        """See AnyShelf."""
        item = self._forget(key)
        if item is not None:
            item.end()
            item.settled.set()

    async def abandon(self, key: str) -> None:
        """Who was making it is gone."""
        item = self._items.get(key)
        if item is not None and item.running is not None:
            await self.settle(key, item.running.otherwise)

    def _make_room(self, newest: str) -> None:
        for old in [k for k, item in self._items.items() if item.running is None and k != newest]:
            if len(self._items) <= self._most and self._bytes <= self._most_bytes:
                return
            self._forget(old)

    def _forget(self, key: str) -> _Item | None:
        item = self._items.pop(key, None)
        if item is not None:
            self._bytes -= len(item.data)
        return item
