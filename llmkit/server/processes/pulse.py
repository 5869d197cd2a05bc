"""Signs of life: a process that hangs does not die, so the end of its socket tells nothing of it.

The engine gives a sign between its steps and, within a step, at every layer: a prompt that takes a slow machine minutes is no
hang. Its supervisor counts its own ticks without one, not the time by the clock: when both were stopped (Ctrl-Z in a shell, a
laptop that slept), neither has missed anything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
TICKS = 10  # in the longest silence
LONGEST = 86400.0  # seconds; more is as good as never


def every(timeout: float) -> float:
    """Seconds between two signs of life, for a silence of `timeout` to be noticed soon; 0 for none."""
    return min(timeout, LONGEST) / TICKS


class Pulse:
    """Gives signs: `beat` calls `give` when the last one is `every` seconds old; never with every=0."""

    def __init__(self, every: float, give: Callable[[], None]) -> None:
        self.every, self._give = every, give
        self._last = time.monotonic()

    def beat(self) -> None:
        """I live."""
        now = time.monotonic()
        if self.every and now - self._last >= self.every:
            self._last = now
            self._give()

    def at_each(self, items: Iterable[T]) -> list[T]:
        """These items in a list that beats at every one that a loop over it takes."""
        return _Beating(items, self.beat)


class _Beating(list[T]):
    def __init__(self, items: Iterable[T], beat: Callable[[], None]) -> None:
        super().__init__(items)
        self._beat = beat

    def __iter__(self) -> Iterator[T]:
        for item in super().__iter__():
            self._beat()
            yield item


class Listener:
    """Hears signs. timeout: seconds of silence that mean a hang; 0: none do. silent: whether it came to that."""

    def __init__(self, timeout: float) -> None:
        self._every = every(timeout)
        self._heard, self.silent = True, False

    def hear(self) -> None:
        """A sign came."""
        self._heard = True

    async def silence(self) -> None:
        """Until nothing was heard for so long, and a tick more: the last sign may be as old as that when a step begins."""
        if not self._every:
            await asyncio.Event().wait()
        ticks = 0
        while ticks <= TICKS:
            await asyncio.sleep(self._every)
            ticks, self._heard = 0 if self._heard else ticks + 1, False
        self.silent = True
