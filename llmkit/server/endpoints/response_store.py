"""Responses that may be asked for again, or continued: the newest ones, in memory."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import msgspec

from llmkit.server.http.errors import HttpError


@dataclass
class Stored:
    """A response and what led to it. items: its input. messages: the whole conversation without its instructions, the answer
    included once it is there. task: what computes it in the background."""

    response: dict[str, Any]
    items: list[dict[str, Any]]
    messages: list[dict[str, Any]]
    task: asyncio.Task[None] | None = None
    size: int = field(default=0)

    @property
    def running(self) -> bool:
        return self.response["status"] in ("queued", "in_progress")


class ResponseStore:
    """Bounded by count and by bytes; what was not used for the longest time goes first. Other fronts have their own."""

    def __init__(self, most: int = 1000, most_bytes: int = 64 * 1024 * 1024) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._all: OrderedDict[str, Stored] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, key: str) -> bool:
        return key in self._all

    def put(self, stored: Stored) -> None:
        """Keep it, or what has become of it."""
        key = stored.response["id"]
        self._forget(key)
        stored.size = len(msgspec.json.encode([stored.response, stored.items, stored.messages]))
        self._all[key] = stored
        self._bytes += stored.size
        for old in [k for k, s in self._all.items() if not s.running and k != key]:
            if len(self._all) <= self._most and self._bytes <= self._most_bytes:
                break
            self._forget(old)

    def get(self, key: str, param: str) -> Stored:
        """Raises 404 naming `param`."""
        stored = self._all.get(key)
        if stored is None:
            raise HttpError(404, f"there is no response {key[:100]!r}",
                            f"each front keeps the newest {self._most} that were made with store=true, in memory", param,
                            "response_not_found")  # fmt: skip
        self._all.move_to_end(key)
        return stored

    def delete(self, key: str, param: str) -> None:
        """Raises 404 naming `param`. One that still runs is cancelled."""
        stored = self.get(key, param)
        if stored.task is not None:
            stored.task.cancel()
        self._forget(key)

    def _forget(self, key: str) -> None:
        old = self._all.pop(key, None)
        if old is not None:
            self._bytes -= old.size
