"""Keeps an engine alive: starts its process, brings it together with the fronts, and starts another one when it dies."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from llmkit import errors
from llmkit.errors import EngineUnavailableError, LlmkitError
from llmkit.server.processes.child import Child
from llmkit.server.processes.pulse import Listener
from llmkit.server.processes.wire import Channel, Failed, NewFront, Ready, Stage, Start, pair

log = logging.getLogger("llmkit.server")
FIRST_DELAY, LONGEST_DELAY = 0.25, 30.0  # seconds before a dead engine's successor; doubled while they die young
YOUNG = 30.0  # seconds


class FrontHandle(Protocol):
    """A front, as the keeper sees it, in this process or in another."""

    def connect_engine(self, channel: socket.socket, ready: Ready) -> None: ...
    def lose_engine(self, why: str) -> None: ...


class EngineKeeper:
    """One engine at a time. on_stage: told of each stage of a start. timeout: seconds of silence that mean a hang; 0: none do.
    `ready` is set while an engine answers."""

    def __init__(self, on_stage: Callable[[Stage], None], timeout: float) -> None:
        self._on_stage, self._timeout = on_stage, timeout
        self._ends = {"died": 0, "hung": 0}  # how engines ended that had been ready
        self._fronts: list[FrontHandle] = []
        self._child: Child | None = None
        self._last: Ready | None = None
        self.ready = asyncio.Event()
        self.was_ready = False

    async def run(self, order: Awaitable[Start]) -> None:
        """Keep an engine for ever. Raises the error of the first start; later ones are tried again and again."""
        delay, order = FIRST_DELAY, asyncio.ensure_future(order)
        while True:
            begin = time.monotonic()
            error = await self._one_life(order)
            if not self.was_ready:
                raise error
            delay = FIRST_DELAY if time.monotonic() - begin > YOUNG else min(2 * delay, LONGEST_DELAY)
            log.warning("%s; another one is started in %.1f s", error.message, delay)
            for front in self._fronts:
                front.lose_engine(error.message)
            await asyncio.sleep(delay)

    async def _one_life(self, order: asyncio.Future[Start]) -> LlmkitError:
        """An engine process from its start to its end; why it ended."""
        child = self._child = await Child.start("llmkit.server.processes.engine_process", "the engine process")
        failure: LlmkitError | None = None
        listener, watch = Listener(self._timeout), None
        try:
            child.send(await asyncio.shield(order))
            async for message in child.messages():
                listener.hear()
                if isinstance(message, Stage):
                    self._on_stage(message)
                elif isinstance(message, Failed):
                    failure = typed_error(message)
                elif isinstance(message, Ready):
                    self._be_ready(message)
                    watch = asyncio.create_task(self._watch(child, listener))
            if listener.silent:
                return await self._how_it_hung(child)
            self._ends["died"] += watch is not None
            how = await child.how_it_ended()
            return failure or EngineUnavailableError(how, "its last words are above" if self.was_ready else _hint(child))
        finally:
            if watch:
                watch.cancel()
            self.ready.clear()
            self._child = None
            await child.stop()

    async def _watch(self, child: Child, listener: Listener) -> None:
        """End an engine that hangs: first for who waits for it, for it may not be quick to die."""
        await listener.silence()
        self._ends["hung"] += 1
        self.ready.clear()
        for front in self._fronts:
            front.lose_engine(f"it gave no sign of life for {self._timeout:g} s")
        await child.put_down()

    async def _how_it_hung(self, child: Child) -> LlmkitError:
        stuck = "and cannot even be killed: it is stuck in a driver, or elsewhere in the system"
        gone = "and was killed" if await child.is_gone() else stuck
        return EngineUnavailableError(f"{child.name} gave no sign of life for {self._timeout:g} s {gone}",
                                      "where it hung is above, if it could say so")  # fmt: skip

    def _be_ready(self, ready: Ready) -> None:
        ready.info["ends"] = dict(self._ends)
        self._last, self.was_ready = ready, True
        self.ready.set()
        for front in self._fronts:
            self._introduce(front, ready)

    def _introduce(self, front: FrontHandle, ready: Ready) -> None:
        """Give engine and front the two ends of a pair of sockets."""
        mine, its = pair()
        with its:
            if self._child:
                self._child.send(NewFront(), (its.fileno(),))
        front.connect_engine(mine, ready)

    def add_front(self, front: FrontHandle) -> None:
        """A front that wants to be connected to every engine."""
        self._fronts.append(front)
        if self.ready.is_set() and self._last:
            self._introduce(front, self._last)

    def remove_front(self, front: FrontHandle) -> None:
        """It is gone."""
        self._fronts.remove(front)

    @property
    def info(self) -> dict[str, Any]:
        """Stages, memory plan and pid of the engine."""
        return self._last.info if self._last else {}


def typed_error(failed: Failed) -> LlmkitError:
    """The error that another process met, as its own class."""
    kind = getattr(errors, failed.kind, LlmkitError)
    kind = kind if isinstance(kind, type) and issubclass(kind, LlmkitError) else LlmkitError
    return kind(failed.message, failed.hint)


def _hint(child: Child) -> str:
    if child.process.returncode == -9:
        return "the system may have run out of memory: take a smaller model, or kv_cache_memory=1"
    return "its last words are above"


__all__ = ["Channel", "EngineKeeper", "FrontHandle", "typed_error"]
