"""The two ends of a link without their processes: a front's EngineLink, and an engine that says what the test wants."""

from __future__ import annotations

import asyncio
import dataclasses
import socket

import numpy as np
import pytest

from llmkit import SamplingParams, StructuredOutputs
from llmkit.errors import EngineUnavailableError, InvalidRequestError, QueueFullError
from llmkit.server.engine_client import TokenPrompt
from llmkit.server.processes.link import EngineLink, plain_params
from llmkit.server.processes.wire import Add, Begun, Channel, End, Ended, Gone, Ready, Refused, Stage, Start, Step, pair
from llmkit.tokenizer import Tokenizer

FACTS = {"model": "m", "folder": "/m", "max_model_len": 100, "max_num_seqs": 4, "vocab_size": 49152, "hidden_size": 4,
         "dtype": "float32", "runs_on": "paper", "defaults": {}}  # fmt: skip
RULES = {"vocab_size": 49152, "max_model_len": 100, "max_logprobs": 20, "seed": 0, "eos_ids": [2], "defaults": {}}


@pytest.fixture(scope="module")
def tokenizer(smollm2_folder):
    return Tokenizer.from_folder(smollm2_folder)


class Engine:
    """The other end, by hand."""

    def __init__(self, link):
        mine, its = pair()
        self.channel, self.heard = Channel(mine), []
        link.connect(Channel(its), Ready(FACTS, RULES, {}))

    def hear(self):
        """What came since."""
        return self.channel.receive()

    async def say(self, tokens, ended=(), begun=(), logprobs=()):
        """tokens: (handle, token) pairs of one step."""
        handles, ids = (np.array(column, np.int32).tobytes() for column in (zip(*tokens) if tokens else ((), ())))
        self.channel.send(Step(handles, ids, list(logprobs), list(begun), list(ended), {"steps": 1}))
        await asyncio.sleep(0.01)


@pytest.fixture
def run(tokenizer):
    """run(test): the coroutine function `test(link, engine)` in a loop of its own."""

    def go(test, **options):
        async def body():
            link = EngineLink(**options)
            link.tokenizer = tokenizer
            engine = Engine(link)
            await asyncio.wait_for(test(link, engine), 10)
            link.disconnect("the test is over")

        asyncio.run(body())

    return go


def prompt(tokenizer, text="one two"):
    return TokenPrompt(tokenizer.encode(text), text)


def test_what_nobody_reads_yet_is_one_growing_piece(run, tokenizer):
    async def test(link, engine):
        stream = link.stream(prompt(tokenizer), SamplingParams(max_tokens=60), request_id="r")
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.01)
        (add,) = engine.hear()
        assert (add.id, add.count, np.frombuffer(add.prompt, np.int32).tolist()) == ("r", 1, tokenizer.encode("one two"))
        assert add.read_along
        tokens = tokenizer.encode(" three four five six seven")
        await engine.say([(add.handle, tokens[0])], begun=[Begun(add.handle, 1, 2.0, 3.0)])
        assert (await first).text == " three"
        for token in tokens[1:-1]:
            await engine.say([(add.handle, token)])
        await engine.say([(add.handle, tokens[-1])], ended=[Ended(add.handle, "length", None, 4.0, 0)])
        (rest,) = [piece async for piece in stream]
        assert (rest.text, rest.token_ids, rest.finish_reason) == (" four five six seven", tokens[1:], "length")
        whole = rest.output()
        assert (whole.text, whole.num_cached_tokens, whole.metrics.first_token_time) == (" three four five six seven", 1, 3.0)
        assert link.stats() == {"steps": 1}
        assert engine.hear() == []

    run(test)


def test_a_stop_string_is_found_here_and_told(run, tokenizer):
    async def test(link, engine):
        answer = asyncio.ensure_future(link.generate(prompt(tokenizer), SamplingParams(stop="six"), request_id="r"))
        await asyncio.sleep(0.01)
        (add,) = engine.hear()
        assert not add.read_along
        for token in tokenizer.encode(" five six seven"):
            await engine.say([(add.handle, token)])
        output = await answer
        assert (output.text, output.outputs[0].finish_reason, output.outputs[0].stop_reason) == (" five ", "stop", "six")
        assert engine.hear() == [End([add.handle])]

    run(test)


@pytest.mark.parametrize("streaming", [True, False])
def test_who_leaves_takes_his_requests_along(run, tokenizer, streaming):
    async def test(link, engine):
        if streaming:
            stream = link.stream(prompt(tokenizer), SamplingParams(n=2), request_id="r")
            waiting = asyncio.ensure_future(anext(stream))
        else:
            waiting = asyncio.ensure_future(link.generate(prompt(tokenizer), SamplingParams(n=2), request_id="r"))
        await asyncio.sleep(0.01)
        (add,) = engine.hear()
        assert link.num_open == 1
        waiting.cancel()
        await asyncio.sleep(0.01)
        assert engine.hear() == [End([add.handle, add.handle + 1])]
        assert link.num_open == 0
        await engine.say([(add.handle, 5)])  # was already on its way

    run(test)


def test_an_engine_that_dies_under_a_request(run, tokenizer):
    async def test(link, engine):
        asked = [link.generate(prompt(tokenizer), SamplingParams(), request_id=str(i)) for i in range(3)]
        streamed = anext(link.stream(prompt(tokenizer), SamplingParams(), request_id="s"))
        outcomes = asyncio.gather(*asked, streamed, return_exceptions=True)
        await asyncio.sleep(0.01)
        engine.channel.close()
        assert [type(o) for o in await outcomes] == [EngineUnavailableError] * 4
        assert not link.healthy
        with pytest.raises(EngineUnavailableError, match="cannot answer now: it died"):
            await link.generate(prompt(tokenizer), SamplingParams(), request_id="late")
        Engine(link)
        assert link.healthy

    run(test)


def test_an_engine_that_comes_before_the_tokenizer_waits_for_it(tokenizer):
    async def body():
        link = EngineLink()
        Engine(link)
        assert not link.healthy
        link.tokenizer = tokenizer
        assert link.healthy
        link.disconnect("the test is over")

    asyncio.run(body())


def test_a_refusal_of_the_engine_is_the_callers_error(run, tokenizer):
    async def test(link, engine):
        params = SamplingParams(structured_outputs=StructuredOutputs(regex="("))
        answer = asyncio.ensure_future(link.generate(prompt(tokenizer), params, request_id="r"))
        await asyncio.sleep(0.01)
        (add,) = engine.hear()
        engine.channel.send(Refused([add.handle], "InvalidRequestError", "no regex", "mend it", "structured_outputs"))
        with pytest.raises(InvalidRequestError, match="no regex") as e:
            await answer
        assert e.value.param == "structured_outputs"

    run(test)


def test_what_cannot_run_is_refused_before_it_travels(run, tokenizer):
    async def test(link, engine):
        for bad, params in [(TokenPrompt([]), {}), (TokenPrompt([1] * 100), {}), (TokenPrompt([1]), {"logprobs": 21}),
                            (TokenPrompt([60000]), {}), (TokenPrompt([1]), {"logit_bias": {60000: 1.0}})]:  # fmt: skip
            with pytest.raises(InvalidRequestError):
                await link.generate(bad, SamplingParams(**params), request_id="r")
        assert engine.hear() == []

    run(test)


def test_more_than_fit_in_the_queue(run, tokenizer):
    async def test(link, engine):
        held = [asyncio.ensure_future(link.generate(prompt(tokenizer), SamplingParams(), request_id=str(i))) for i in range(2)]
        await asyncio.sleep(0.01)
        with pytest.raises(QueueFullError):
            await link.generate(prompt(tokenizer), SamplingParams(), request_id="r")
        with pytest.raises(QueueFullError):
            await link.embed([prompt(tokenizer)])
        held[0].cancel()
        await asyncio.sleep(0.01)
        third = asyncio.ensure_future(link.generate(prompt(tokenizer), SamplingParams(), request_id="r"))
        await asyncio.sleep(0.01)
        assert not third.done()
        third.cancel()
        held[1].cancel()
        await asyncio.sleep(0.01)

    run(test, max_open=2)


def test_an_embedding(run, tokenizer):
    async def test(link, engine):
        vectors = asyncio.ensure_future(link.embed([prompt(tokenizer)] * 2, "mean"))
        await asyncio.sleep(0.01)
        adds = engine.hear()
        assert [a.pooling for a in adds] == ["mean", "mean"]
        three_four = np.array([3, 4], np.float32).tobytes()
        await engine.say([], ended=[Ended(a.handle, "stop", None, 1.0, 0, three_four) for a in adds])
        assert await vectors == [pytest.approx([0.6, 0.8])] * 2

    run(test)


def test_requests_of_two_fronts_never_share_a_seed(tokenizer):
    async def body():
        seeds = []
        for number in range(2):
            link = EngineLink(number=number, count=2)
            link.tokenizer = tokenizer
            for _ in range(2):  # engines
                engine = Engine(link)
                calls = [link.generate(prompt(tokenizer), SamplingParams(), request_id="r") for _ in range(5)]
                asked = [asyncio.ensure_future(call) for call in calls]
                await asyncio.sleep(0.01)
                seeds += [add.seed for add in engine.hear()]
                for task in asked:
                    task.cancel()
            link.disconnect("the test is over")
        assert len(set(seeds)) == 20

    asyncio.run(body())


def test_parameters_travel_as_they_are():
    asked = SamplingParams(n=2, temperature=0.3, stop=["a"], logit_bias={5: 1.5}, logprobs=3, seed=7, bad_words=["x"],
                           structured_outputs=StructuredOutputs(json={"type": "object"}))  # fmt: skip
    near, far = (Channel(s) for s in pair())
    near.send(Add(1, 2, "r", b"", plain_params(asked)))
    (add,) = far.receive()
    arrived = SamplingParams(**add.params)
    assert dataclasses.asdict(arrived) == dataclasses.asdict(asked)
    assert plain_params(SamplingParams()) == {}


# ---- the wire


def test_messages_larger_than_the_socket_arrive_whole_and_in_order():
    near, far = (Channel(s) for s in pair())
    names = ["x" * size for size in (10, 3_000_000, 0, 70_000)]
    for name in names:
        near.send(Start({"a": 1}, name))
    assert near.full
    found = []
    while len(found) < len(names):
        found += far.receive()
        near.flush()
    assert [m.name for m in found] == names
    assert not near.full
    assert far.receive() == []


def test_a_socket_travels_with_its_message():
    near, far = (Channel(s) for s in pair())
    one, other = socket.socketpair()
    near.send(Stage("before", {}))
    near.send(Stage("with", {}), (other.fileno(),))
    other.close()
    assert [m.name for m in far.receive() + far.receive()] == ["before", "with"]
    with far.take_socket() as arrived:
        arrived.send(b"hello")
        assert one.recv(10) == b"hello"


@pytest.mark.parametrize("action", ["send", "receive"])
def test_the_end_of_the_other_process_is_noticed(action):
    near, far = (Channel(s) for s in pair())
    far.close()
    with pytest.raises(Gone):
        near.send(Stage("x", {})) if action == "send" else near.receive()
