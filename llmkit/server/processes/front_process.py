"""One of several fronts, in a process of its own: does what its launcher says, ends when its launcher does."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from llmkit.garbage import spare_what_is_there
from llmkit.server.processes.far_shelf import FarShelf
from llmkit.server.processes.front import HttpFront, log_to_stderr
from llmkit.server.processes.lifeline import when_stdin_closes
from llmkit.server.processes.post import post
from llmkit.server.processes.serve_options import Plan
from llmkit.server.processes.wire import BeFront, Channel, EndRunning, EngineGone, FrontUp, Gone, NewEngine, Stage, Stop, Told


class FrontServer:
    """Hears the launcher."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._front: HttpFront | None = None
        self._shelf = FarShelf(lambda message: post(channel, message))
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()

    async def run(self) -> None:
        """Until told to stop, or the launcher is gone (which `lifeline` notices, too, whatever this loop does)."""
        asyncio.get_running_loop().add_reader(self._channel, self._hear)
        await self._ended.wait()
        for task in self._tasks:
            if task.done():
                task.result()

    def _hear(self) -> None:
        try:
            messages = self._channel.receive()
        except Gone:
            self._ended.set()
            return
        for message in messages:
            if isinstance(message, BeFront):
                self._begin(message)
            elif self._front is not None:
                self._obey(self._front, message)

    def _begin(self, order: BeFront) -> None:
        plan = Plan.from_plain(order.plan)
        log_to_stderr(plan.serving.log_level)
        listening, numbers = self._channel.take_socket(), self._channel.files.popleft()
        self._front = HttpFront(plan, listening, order.number, order.count, numbers, self._shelf)
        self._do(self._front.serve(order.early), then_end=True)
        self._do(self._get_ready(self._front, Path(order.folder)))

    def _obey(self, front: HttpFront, message: Any) -> None:
        if isinstance(message, Stage):
            front.link.stage = message.name
        elif isinstance(message, NewEngine):
            front.connect_engine(self._channel.take_socket(), message.ready)
        elif isinstance(message, EngineGone):
            front.lose_engine(message.why)
        elif isinstance(message, Told | EndRunning):
            self._shelf.hear(message)
        elif isinstance(message, Stop):
            self._do(front.stop(message.seconds))

    async def _get_ready(self, front: HttpFront, home: Path) -> None:
        await front.read_tokenizer(home)
        await front.up.wait()
        post(self._channel, FrontUp())
        spare_what_is_there()

    def _do(self, work: Any, then_end: bool = False) -> None:
        """Begin a task. One that fails ends this process: its launcher starts another."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)

        def done(task: asyncio.Task[None]) -> None:
            if then_end or task.cancelled() or task.exception():
                self._ended.set()

        task.add_done_callback(done)


def main() -> None:
    """`python -m llmkit.server.processes.front_process FD`: FD is the socket to the launcher."""
    when_stdin_closes(lambda: os._exit(0))
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the launcher decides what they mean
        signal.signal(number, signal.SIG_IGN)
    asyncio.run(FrontServer(Channel(socket.socket(fileno=int(sys.argv[1])))).run())


if __name__ == "__main__":
    main()
