"""A process of the server's own: a module of llmkit, with a socket to its parent, that ends when its parent does."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import llmkit
from llmkit.server.processes.wire import Channel, Gone, Message, pair


class Child:
    """`python -m module FD`; its stdin is a pipe that nobody else holds, so it ends with this process (see `lifeline`)."""

    def __init__(self, process: asyncio.subprocess.Process, channel: Channel, name: str) -> None:
        self.process, self.channel, self.name = process, channel, name

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
        try:
            self.channel.send(message, files)
        except Gone:
            return

    async def messages(self) -> AsyncIterator[Any]:
        """What it says, until it is gone."""
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self.channel, readable.set)
        try:
            while True:
                await readable.wait()
                readable.clear()
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

    async def stop(self) -> None:
        """End it: at once, for closing its stdin does."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.channel.close()
        try:
            async with asyncio.timeout(1):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


def _environment() -> dict[str, str]:
    """The same llmkit, wherever this one was found."""
    house = Path(llmkit.__file__).parents[1]
    paths = [p for p in sys.path if p] + [str(house)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
