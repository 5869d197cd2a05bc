"""Async iterators for a cell. A kernel's own event loop is running, so a cell may not run another one in its thread."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
_END = object()


def in_thread(events: AsyncGenerator[T, None]) -> Iterator[T]:
    """The items of `events`, which run in an event loop of their own, in a thread of their own. Leaving early, by an interrupt
    too, closes them there: the interrupt reaches this thread only, never the middle of their work."""
    box: queue.SimpleQueue[Any] = queue.SimpleQueue()
    running: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = Future()

    async def pump() -> None:
        task = asyncio.current_task()
        assert task is not None
        running.set_result((asyncio.get_running_loop(), task))
        async with contextlib.aclosing(events):
            async for event in events:
                box.put(event)

    def work() -> None:
        try:
            asyncio.run(pump())
            box.put(_END)
        except asyncio.CancelledError:
            box.put(_END)
        except Exception as e:  # raised where the items are read
            box.put(_Failed(e))

    thread = threading.Thread(target=work, name="llmkit-cell", daemon=True)
    thread.start()
    loop, task = running.result()
    try:
        while (event := box.get()) is not _END:
            if isinstance(event, _Failed):
                raise event.error
            yield event
    finally:
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has come to its end
            loop.call_soon_threadsafe(task.cancel)
        thread.join(5)


class _Failed:
    def __init__(self, error: Exception) -> None:
        self.error = error
