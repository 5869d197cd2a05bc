"""The fronts of a server, as its launcher sees them: one in its own process, or several in processes of theirs."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from pathlib import Path
from typing import Protocol

from llmkit.server.metrics.prometheus import Shared
from llmkit.server.processes.child import Child
from llmkit.server.processes.far_shelf import ShelfDesk
from llmkit.server.processes.front import LAST_WORDS, HttpFront
from llmkit.server.processes.keeper import FIRST_DELAY, LONGEST_DELAY, YOUNG, EngineKeeper
from llmkit.server.processes.serve_options import Plan
from llmkit.server.processes.wire import BeFront, EngineGone, FrontUp, NewEngine, OnShelf, Ready, Stage, Stop
from llmkit.server.shelf import Shelf

log = logging.getLogger("llmkit.server")


class Fronts(Protocol):
    """All fronts. tokenizer_home: set once the folder is known that the tokenizer is read from."""

    async def run(self, home: asyncio.Future[Path]) -> None: ...
    async def wait_until_up(self) -> None: ...
    def tell(self, stage: Stage) -> None: ...
    async def stop(self, seconds: float) -> None: ...


class OneFront:
    """The front in the launcher's own process."""

    def __init__(self, plan: Plan, listening: socket.socket, keeper: EngineKeeper) -> None:
        self._front = HttpFront(plan, listening)
        keeper.add_front(self._front)

    async def run(self, home: asyncio.Future[Path]) -> None:
        """Serve until stopped."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._front.serve())
            await self._front.read_tokenizer(await asyncio.shield(home))

    async def wait_until_up(self) -> None:
        """Until it answers."""
        await self._front.up.wait()

    def tell(self, stage: Stage) -> None:
        """What the start is at."""
        self._front.link.stage = stage.name

    async def stop(self, seconds: float) -> None:
        """See HttpFront.stop."""
        await self._front.stop(seconds)


class FrontProcess:
    """A front in a process of its own."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.up = asyncio.Event()

    def connect_engine(self, channel: socket.socket, ready: Ready) -> None:
        """Pass it on."""
        with channel:
            self.child.send(NewEngine(ready), (channel.fileno(),))

    def lose_engine(self, why: str) -> None:
        """Pass it on."""
        self.child.send(EngineGone(why))


class ManyFronts:
    """`api_server_count` processes that accept from one listening socket; one that dies is replaced."""

    def __init__(self, plan: Plan, listening: socket.socket, keeper: EngineKeeper) -> None:
        self._plan, self._listening, self._keeper = plan, listening, keeper
        self._shelf = Shelf()
        self._numbers = Shared.create(plan.serving.api_server_count)
        self._alive: dict[int, FrontProcess] = {}
        self._all_up = asyncio.Event()
        self._stopping = False

    async def run(self, home: asyncio.Future[Path]) -> None:
        """Keep them all until stopped."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._plan.serving.api_server_count):
                group.create_task(self._keep(number, home))

    async def _keep(self, number: int, home: asyncio.Future[Path]) -> None:
        delay, first = FIRST_DELAY, True
        while not self._stopping:
            begin = time.monotonic()
            how = await self._one_life(number, home, early=first)
            first = False
            delay = FIRST_DELAY if time.monotonic() - begin > YOUNG else min(2 * delay, LONGEST_DELAY)
            if not self._stopping:
                log.warning("%s; another one is started in %.1f s", how, delay)
                await asyncio.sleep(delay)

    async def _one_life(self, number: int, home: asyncio.Future[Path], early: bool) -> str:
        child = await Child.start("llmkit.server.processes.front_process", f"front {number}")
        front = self._alive[number] = FrontProcess(child)
        desk = ShelfDesk(self._shelf, child.send)
        try:
            folder = str(await asyncio.shield(home))
            child.send(BeFront(self._plan.to_plain(), folder, number, self._plan.serving.api_server_count, early),
                       (self._listening.fileno(), self._numbers.fileno()))  # fmt: skip
            self._keeper.add_front(front)
            async for message in child.messages():
                if isinstance(message, FrontUp):
                    front.up.set()
                    self._look()
                elif isinstance(message, OnShelf):
                    desk.hear(message)
            return await child.how_it_ended()
        finally:
            del self._alive[number]
            self._keeper.remove_front(front)
            await desk.close()
            await child.stop()

    def _look(self) -> None:
        if sum(f.up.is_set() for f in self._alive.values()) == self._plan.serving.api_server_count:
            self._all_up.set()

    async def wait_until_up(self) -> None:
        """Until all answer."""
        await self._all_up.wait()

    def tell(self, stage: Stage) -> None:
        """What the start is at."""
        for front in self._alive.values():
            front.child.send(stage)

    async def stop(self, seconds: float) -> None:
        """Have each do `HttpFront.stop`. One that is not up has nothing to end."""
        self._stopping = True
        busy = [f for f in self._alive.values() if f.up.is_set()]
        for front in busy:
            front.child.send(Stop(seconds))
        end = time.monotonic() + seconds + LAST_WORDS + 1
        while any(f.child.process.returncode is None for f in busy) and time.monotonic() < end:
            await asyncio.sleep(0.02)


def fronts(plan: Plan, listening: socket.socket, keeper: EngineKeeper) -> Fronts:
    """As many as the plan says."""
    kind = OneFront if plan.serving.api_server_count == 1 else ManyFronts
    return kind(plan, listening, keeper)
