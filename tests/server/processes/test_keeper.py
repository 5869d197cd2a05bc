"""The keeper of engines, with engines made by hand."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import Any, cast

from llmkit.server.processes import child as child_module
from llmkit.server.processes import keeper as keeper_module
from llmkit.server.processes.child import SAY_WHERE, Child
from llmkit.server.processes.keeper import EngineKeeper
from llmkit.server.processes.wire import Alive, Channel, Ready, Start, pair


class Undying:
    """A process that is stuck within the kernel: not even SIGKILL ends it."""

    stdin = returncode = None

    def __init__(self):
        self.signals = []

    def send_signal(self, number):
        self.signals.append(number)

    def kill(self):
        self.signals.append(signal.SIGKILL)

    async def wait(self):
        await asyncio.Event().wait()


class Front:
    def __init__(self):
        self.news = []

    def connect_engine(self, channel, ready):
        channel.close()
        self.news.append(dict(ready.info["ends"]))

    def lose_engine(self, why):
        self.news.append(why)


def test_an_engine_that_hangs_and_cannot_be_killed_is_left_behind(monkeypatch, caplog):
    """Nobody waits for its death: neither its clients nor its successor."""
    engines, far_ends = [], []

    async def start(module, name):
        mine, its = pair()
        far_ends.append(Channel(its))
        far_ends[-1].send(Ready({}, {}, {}))
        engines.append(Child(cast(Any, Undying()), Channel(mine), name))
        return engines[-1]

    monkeypatch.setattr(keeper_module.Child, "start", start)
    for name in ("LAST_LOOK", "LONGEST_END", "LONGEST_DEATH"):
        monkeypatch.setattr(child_module, name, 0.05)
    front = Front()

    async def body():
        keeper = EngineKeeper(lambda stage: None, timeout=0.3)
        keeper.add_front(front)
        order = asyncio.get_running_loop().create_future()
        order.set_result(Start({}, "m"))
        life = asyncio.create_task(keeper.run(order))
        while len(engines) < 2:
            await asyncio.sleep(0.01)
        for _ in range(10):
            far_ends[1].send(Alive())
            await asyncio.sleep(0.05)
        assert keeper.ready.is_set()
        life.cancel()
        await asyncio.gather(life, return_exceptions=True)

    with caplog.at_level(logging.WARNING, "llmkit.server"):
        asyncio.run(asyncio.wait_for(body(), 30))
    assert engines[0].process.signals[:2] == [SAY_WHERE, signal.SIGKILL]
    first, why, more, second = front.news
    assert (first, second) == ({"died": 0, "hung": 0}, {"died": 0, "hung": 1})
    assert why == "it gave no sign of life for 0.3 s"
    assert "cannot even be killed" in more
    assert "cannot even be killed: it is stuck in a driver" in caplog.text
    assert "another one is started" in caplog.text
