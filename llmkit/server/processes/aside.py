"""Work beside an event loop, in a thread that nobody waits for when the process ends (asyncio waits for its own threads)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


async def aside(work: Callable[..., T], *args: Any) -> T:
    """`work(*args)` in a thread of its own; its result or its exception. Cancelled, it goes on unheard."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(error)

    def run() -> None:
        try:
            outcome: tuple[Any, BaseException | None] = (work(*args), None)
        except BaseException as e:
            outcome = (None, e)
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, name=f"llmkit-{getattr(work, '__name__', 'work')}", daemon=True).start()
    return await future
