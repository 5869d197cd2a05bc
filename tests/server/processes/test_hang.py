"""An engine that hangs does not die: it is noticed, its requests end as if it had died, and another one comes."""

from __future__ import annotations

import asyncio
import signal
import threading
import time

import pytest

from llmkit.server.processes.pulse import TICKS, Listener, Pulse, every

TIMEOUT = 2.0  # seconds; a step of the dummy model takes milliseconds


@pytest.fixture(scope="module")
def server(start_once):
    return start_once("--engine-timeout", str(TIMEOUT))


def engine_of(server):
    (engine,) = [p for p in server.remember() if "engine_process" in " ".join(p.cmdline())]
    return engine


class Load:
    """Streams that have begun, and are read to their ends."""

    def __init__(self, server, count=8, max_tokens=1900):
        self.server, self.max_tokens, self.outcomes = server, max_tokens, []
        self.begun = [threading.Event() for _ in range(count)]
        self.clients = [threading.Thread(target=self.ask, args=(begun,)) for begun in self.begun]
        for client in self.clients:
            client.start()
        assert all(begun.wait(30) for begun in self.begun)

    def ask(self, begun):
        found = []
        with self.server.stream(prompt="Once", max_tokens=self.max_tokens) as response:
            for event in self.server.events(response):
                found.append(event)
                begun.set()
        self.outcomes.append(found)

    def ends(self, seconds=30):
        for client in self.clients:
            client.join(seconds)
        assert len(self.outcomes) == len(self.clients)
        return [found[-1] for found in self.outcomes]


def test_one_that_stops_under_load_is_replaced_and_every_client_hears_of_it(server):
    engine, load = engine_of(server), Load(server)
    engine.send_signal(signal.SIGSTOP)
    waiting = server.http.post(f"{server.url}/v1/completions", json=server.body(max_tokens=4))
    assert (waiting.status_code, waiting.json()["error"]["type"]) == (503, "service_unavailable_error")
    assert waiting.headers["Retry-After"]
    assert waiting.headers["X-Request-Id"]
    for last in load.ends():
        assert last["error"]["type"] == "service_unavailable_error"
        assert "it gave no sign of life for 2 s" in last["error"]["message"]
    server.until("its end", lambda: not engine.is_running(), 10)
    server.until("health", server.healthy)
    assert server.complete(max_tokens=3)["choices"][0]["finish_reason"] == "length"
    said = "the engine process gave no sign of life for 2 s and was killed; another one is started"
    server.until("the news", lambda: said in server.log.read_text(), 5)
    assert 'reason="hung"} 1.0' in server.get("/metrics").text
    assert 'reason="died"} 0.0' in server.get("/metrics").text


def test_one_that_goes_on_in_time_is_left_alone_and_so_is_one_that_has_nothing_to_do(server):
    engine, load = engine_of(server), Load(server, count=2, max_tokens=300)
    engine.send_signal(signal.SIGSTOP)
    time.sleep(TIMEOUT / 2)
    assert server.get("/health").status_code == 200
    engine.send_signal(signal.SIGCONT)
    assert [last["choices"][0]["finish_reason"] for last in load.ends()] == ["length"] * 2
    time.sleep(1.3 * TIMEOUT)
    assert engine_of(server) == engine
    assert server.complete(max_tokens=3)["choices"][0]["finish_reason"] == "length"


# ---- signs of life


def heard(timeout, work):
    """Whether a Listener took it for a hang while `work(listener)` ran."""

    async def body():
        listener = Listener(timeout)
        silence = asyncio.create_task(listener.silence())
        await work(listener)
        assert listener.silent is silence.done()
        silence.cancel()
        return listener.silent

    return asyncio.run(body())


def test_silence_is_a_hang_and_a_sign_now_and_then_is_none():
    async def silent(listener):
        end = time.monotonic() + 5
        while not listener.silent and time.monotonic() < end:
            await asyncio.sleep(0.01)

    async def speaking(listener):
        for _ in range(10):
            await asyncio.sleep(0.05)
            listener.hear()

    assert heard(0.2, silent)
    assert not heard(0, lambda _: asyncio.sleep(0.2))
    assert not heard(0.4, speaking)  # which must not be seven times as slow


def test_who_was_stopped_himself_has_missed_nothing():
    async def stopped(_):
        await asyncio.sleep(0)
        time.sleep(0.5)  # the loop, as Ctrl-Z in a shell stops it, and the engine with it
        await asyncio.sleep(0.05)

    assert not heard(0.2, stopped)


def test_signs_are_given_at_most_so_often():
    given = []
    pulse = Pulse(0.05, lambda: given.append(time.monotonic()))
    layers, end = pulse.at_each(range(4)), time.monotonic() + 0.3
    while time.monotonic() < end:
        assert [layer for layer in layers] == [0, 1, 2, 3]  # noqa: C416  # a list(...) of a list would not ask its iterator
    assert 1 <= len(given) <= 6
    silent = Pulse(0, lambda: given.append(0.0))
    silent.beat()
    assert 0.0 not in given
    assert every(120) == 120 / TICKS
    assert every(float("inf")) < 1e5  # a wait that every system can do
