"""Responses that may be asked for again, or continued."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from llmkit.server.http.errors import HttpError
from llmkit.server.shelf import MOST, AnyShelf, Running

LOST = {"status": "failed", "error": {"code": "server_error", "message": "the process that computed this response has ended"}}


@dataclass
class Stored:
    """A response and what led to it. items: its input. messages: the whole conversation without its instructions, the answer
    included once it is there."""

    response: dict[str, Any]
    items: list[dict[str, Any]]
    messages: list[dict[str, Any]]

    @property
    def key(self) -> str:
        return self.response["id"]

    @property
    def running(self) -> bool:
        return self.response["status"] in ("queued", "in_progress")

    def to_bytes(self, **changes: Any) -> bytes:
        """changes: of the response."""
        return msgspec.json.encode([self.response | changes, self.items, self.messages])


class ResponseStore:
    """The newest responses of this server, whichever front made them."""

    def __init__(self, shelf: AnyShelf) -> None:
        self._shelf = shelf

    async def put(self, stored: Stored, end: Callable[[], object] | None = None) -> None:
        """Keep it. end: what ends one that still runs; `settle` follows then."""
        running = Running(end, stored.to_bytes(**LOST)) if end else None
        await self._shelf.keep(stored.key, stored.to_bytes(), running)

    async def settle(self, stored: Stored) -> None:
        """Keep what has become of one that ran, unless it was deleted."""
        await self._shelf.settle(stored.key, stored.to_bytes())

    async def get(self, key: str, param: str) -> Stored:
        """Raises 404 naming `param`."""
        data = await self._shelf.fetch(key)
        if data is None:
            raise HttpError(404, f"there is no response {key[:100]!r}",
                            f"the server keeps the newest {MOST} that were made with store=true, in memory", param,
                            "response_not_found")  # fmt: skip
        return Stored(*msgspec.json.decode(data))

    async def end(self, key: str, param: str) -> Stored:
        """End one that runs; what has become of it. Raises 404 naming `param`."""
        await self._shelf.end(key)
        return await self.get(key, param)

    async def delete(self, key: str, param: str) -> None:
        """Raises 404 naming `param`. One that still runs is ended."""
        await self.get(key, param)
        await self._shelf.drop(key)
