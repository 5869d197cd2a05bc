"""What the engine's process does, in this one: an EngineServer in a thread, and the fronts' ends of its sockets in the test."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict

import numpy as np
import pytest

from llmkit import EngineConfig, SamplingParams, StructuredOutputs
from llmkit.engine.start import start_engine
from llmkit.errors import LlmkitError
from llmkit.prompts import rules_of
from llmkit.server.processes.engine_process import EngineServer
from llmkit.server.processes.link import plain_params
from llmkit.server.processes.wire import Add, Alive, Channel, End, Gone, NewFront, Refused, Step, pair


class Far:
    """A front's end."""

    def __init__(self, channel):
        self.channel, self.steps, self.refused = channel, [], []

    def ask(self, handle, count=1, read_along=True, **options):
        params = SamplingParams(**{"max_tokens": 8, "temperature": 0, "n": count} | options)
        prompt, longest = np.array([5, 6, 7], np.int32).tobytes(), 3 + (params.max_tokens or 500)
        self.channel.send(Add(handle, count, f"r{handle}", prompt, plain_params(params), max_total=longest,
                              read_along=read_along))  # fmt: skip

    def hear(self, until):
        end = time.monotonic() + 20
        while not until(self):
            assert time.monotonic() < end, (self.steps, self.refused)
            for message in self.channel.receive():
                (self.steps if isinstance(message, Step) else self.refused).append(message)
            time.sleep(0.001)
        return self

    def tokens(self, handle):
        both = [(np.frombuffer(s.handles, np.int32), np.frombuffer(s.tokens, np.int32)) for s in self.steps]
        return [int(t) for handles, tokens in both for h, t in zip(handles, tokens) if h == handle]

    @property
    def ended(self):
        return {e.handle: e.reason for s in self.steps for e in s.ended}

    @property
    def stats(self):
        return self.steps[-1].stats if self.steps else {}


@pytest.fixture(scope="module")
def started(dummy_folder):
    return start_engine(EngineConfig(model=str(dummy_folder), load_format="dummy", max_model_len=512))


@pytest.fixture
def engine(started):
    """(the EngineServer, a function that makes one more front)."""
    mine, its = pair()
    control, server = Channel(mine), EngineServer(started, rules_of(started).eos_ids, Channel(its), alive_every=0.02)

    def run():
        with pytest.raises(Gone):
            server.run()

    thread = threading.Thread(target=run)
    thread.start()

    def front():
        here, there = pair()
        control.send(NewFront(), (there.fileno(),))
        there.close()
        return Far(Channel(here))

    front.control = control
    yield server, front
    control.close()
    thread.join(10)
    assert not thread.is_alive()
    started.engine.abort(started.engine.scheduler.unfinished())


def test_one_message_a_step_has_all_tokens(engine):
    _, front = engine
    far = front()
    for handle in range(1, 11):
        far.ask(handle)
    far.hear(lambda f: len(f.ended) == 10)
    assert all(len(far.tokens(h)) == 8 for h in range(1, 11))
    assert len([s for s in far.steps if s.handles]) < 20
    assert sum(len(s.begun) for s in far.steps) == 10


def test_it_is_known_who_reads_along(engine, monkeypatch):
    server, front = engine
    far, told, add = front(), {}, server._engine.add
    monkeypatch.setattr(server._engine, "add", lambda request: (told.update({request.id: request.read_along}), add(request)))
    far.ask(1, count=2, read_along=False)
    far.ask(3)
    far.hear(lambda f: len(f.ended) == 3)
    assert told == {"r1": False, "r1/1": False, "r3": True}


def test_the_engine_says_when_all_is_free_again(engine):
    _, front = engine
    far = front()
    far.ask(1, max_tokens=400)
    far.hear(lambda f: f.tokens(1))
    far.channel.send(End([1]))
    far.hear(lambda f: f.stats["running"] == 0 and f.stats["kv_blocks_free"] == f.stats["kv_blocks_total"])
    assert far.ended == {}


def test_a_front_that_leaves_takes_its_requests_and_nobody_elses(engine):
    _, front = engine
    leaving, staying = front(), front()
    leaving.ask(1, count=3, max_tokens=400)
    leaving.hear(lambda f: f.tokens(3))
    staying.ask(1, max_tokens=100)
    leaving.channel.close()
    staying.hear(lambda f: f.ended == {1: "length"} and f.stats["running"] == 0)
    assert len(staying.tokens(1)) == 100


def test_a_step_that_breaks_ends_its_requests_and_nothing_else(engine, started, monkeypatch, capfd):
    _, front = engine
    far, plain, broken = front(), started.engine.step, []

    def step():
        if started.engine.has_work and not broken:
            broken.append(plain())
            raise RuntimeError("it broke")
        return plain()

    monkeypatch.setattr(started.engine, "step", step)
    far.ask(1, count=2)
    far.hear(lambda f: f.refused)
    assert far.refused[0].kind == "EngineUnavailableError"
    assert "RuntimeError: it broke" in far.refused[0].message
    assert sorted(far.refused[0].handles) == [1, 2]
    far.ask(3)
    far.hear(lambda f: 3 in f.ended)
    assert "RuntimeError: it broke" in capfd.readouterr().err


def test_grammars_are_compiled_beside_the_steps(engine, started, monkeypatch):
    _, front = engine
    far, compiling, go_on = front(), threading.Event(), threading.Event()
    server = engine[0]
    plain = server._grammar

    def slow(spec):
        compiling.set()
        assert go_on.wait(10)
        return plain(spec)

    monkeypatch.setattr(server, "_grammar", slow)
    digits = StructuredOutputs(regex="[0-9]{3}")
    far.ask(1, structured_outputs=asdict(digits))
    far.ask(2, structured_outputs=asdict(digits))
    assert compiling.wait(5)
    far.ask(3)
    far.hear(lambda f: 3 in f.ended)
    far.channel.send(End([1]))
    far.ask(4)
    far.hear(lambda f: 4 in f.ended)
    go_on.set()
    far.hear(lambda f: 2 in f.ended)
    assert started.tokenizer.decode(far.tokens(2), True).isdigit()
    assert far.tokens(1) == []


@pytest.mark.parametrize("cause", [LlmkitError("typed"), ValueError("a library's own")])
def test_a_grammar_that_cannot_be_compiled_is_refused(engine, monkeypatch, cause):
    server, front = engine
    far = front()

    def fail(spec):
        raise cause

    monkeypatch.setattr(server, "_grammar", fail)
    far.ask(1, count=2, structured_outputs={"regex": "a"})
    far.hear(lambda f: f.refused)
    (refused,) = far.refused
    assert isinstance(refused, Refused)
    assert refused.handles == [1, 2]
    assert str(cause) in refused.message


def signs(front, seconds):
    """Signs of life that the supervisor gets in this time."""
    front.control.receive()
    found, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        found += front.control.receive()
        time.sleep(0.005)
    assert all(isinstance(message, Alive) for message in found)
    return len(found)


def test_signs_of_life_come_at_rest_and_at_work_and_from_within_a_step_but_not_from_one_that_hangs(engine, started, monkeypatch):
    server, front = engine
    far, model, hung, go_on = front(), started.engine.model, threading.Event(), threading.Event()
    assert 1 <= signs(front, 0.2) <= 11
    far.ask(1, max_tokens=400)
    assert 1 <= signs(front, 0.2) <= 11
    far.channel.send(End([1]))

    def slow(*step):
        time.sleep(0.04)
        return plain(*step)

    def hang(*step):
        hung.set()
        assert go_on.wait(20)
        return plain(*step)

    plain, layers = model.layers[0], list(model.layers)
    monkeypatch.setattr(model, "layers", server.pulse.at_each([slow] * 20))
    far.ask(2, max_tokens=1)
    time.sleep(0.1)
    assert signs(front, 0.3) >= 2  # of a step that takes 0.8 s
    far.hear(lambda f: 2 in f.ended)
    monkeypatch.setattr(model, "layers", server.pulse.at_each([hang, *layers]))
    far.ask(3, max_tokens=1)
    assert hung.wait(10)
    assert signs(front, 0.2) == 0
    go_on.set()
    far.hear(lambda f: 3 in f.ended)
