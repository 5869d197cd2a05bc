"""A process of the server's own: a module of llmkit, with a socket to its parent, that ends when its parent does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import llmkit
from llmkit.server.processes.post import post, stop_posting
from llmkit.server.processes.wire import Channel, Gone, Message, pair

SAY_WHERE = signal.SIGUSR1  # asks a process that hangs for a traceback of all its threads; one that knows no better dies of it
LAST_LOOK, LONGEST_END, LONGEST_DEATH = 0.2, 1.0, 5.0  # seconds for the traceback, for an end after stdin's, for one by SIGKILL


class Child:
    """`python -m module FD`; its stdin is a pipe that nobody else holds, so it ends with this process (see `lifeline`)."""

    def __init__(self, process: asyncio.subprocess.Process, channel: Channel, name: str) -> None:
        self.process, self.channel, self.name = process, channel, name
        self._readable, self._hung_up = asyncio.Event(), False

    @classmethod
    async def start(cls, module: str, name: str) -> Child:
        """Start it. name: for messages about its end."""
        mine, its = pair()
        with its:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", module, str(its.fileno()), stdin=asyncio.subprocess.PIPE,
                pass_fds=[its.fileno()], env=_environment(),
            )  # fmt: skip
        return cls(process, Channel(mine), name)

    def send(self, message: Message, files: tuple[int, ...] = ()) -> None:
        """Tell it something; nothing happens when it is gone, for that is noticed elsewhere."""
        post(self.channel, message, files)

    async def messages(self) -> AsyncIterator[Any]:
        """What it says, until it is gone or was put down."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self.channel, self._readable.set)
        try:
            while not self._hung_up:
                await self._readable.wait()
                self._readable.clear()
                for message in self.channel.receive():
                    yield message
        except Gone:
            return
        finally:
            loop.remove_reader(self.channel)

    async def how_it_ended(self) -> str:
        """Wait for its end, and say it in words."""
        code = await self.process.wait()
        if code >= 0:
            return f"{self.name} ended with exit code {code}"
        return f"{self.name} was killed by {signal.Signals(-code).name}"

    async def put_down(self) -> None:
        """End one that hangs: it says where, if it still can, and is killed. Nothing it says afterwards is heard."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(SAY_WHERE)
            await asyncio.sleep(LAST_LOOK)
            self.process.kill()
        self._hung_up = True
        self._readable.set()

    async def is_gone(self) -> bool:
        """Whether it goes now: one that is stuck within the kernel, in a driver say, may never do so."""
        try:
            async with asyncio.timeout(LONGEST_DEATH):
                await self.process.wait()
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """End it: at once, for closing its stdin does."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        stop_posting(self.channel)
        self.channel.close()
        try:
            async with asyncio.timeout(LONGEST_END):
                await self.process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.is_gone()


def _environment() -> dict[str, str]:
    """The same llmkit, wherever this one was found."""
    house = Path(llmkit.__file__).parents[1]
    paths = [p for p in sys.path if p] + [str(house)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
