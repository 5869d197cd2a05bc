"""The async twins: inside a running loop, as in a notebook, many at once, cancelled, closed, broken."""

import asyncio
import threading
import time

import pytest

from llmkit import LLM, SamplingParams
from llmkit.errors import EngineClosedError, EngineError, InvalidRequestError

LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


def load(folder):
    return LLM(folder, load_format="dummy", max_model_len=256, max_num_seqs=16, kv_cache_memory=0.05)


@pytest.fixture(scope="module")
def llm(dummy_folder):
    with load(dummy_folder) as llm:
        yield llm


def all_free(llm):
    stats = llm.stats()
    return stats["kv_blocks_free"] == stats["kv_blocks_total"] and stats["running"] == stats["waiting"] == 0


def test_many_at_once_are_batched_and_equal_the_plain_answers(llm):
    prompts = [f"Number {i}:" for i in range(12)]

    async def main():
        return await asyncio.gather(*[llm.agenerate(p, SHORT) for p in prompts])

    before = llm.stats()["steps"]
    together = asyncio.run(main())
    steps = llm.stats()["steps"] - before
    assert steps <= 5 + 12  # 60 if each ran alone
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in llm.generate(prompts, SHORT)]
    assert all_free(llm)


def test_astream_is_stream(llm):
    async def main():
        return [c.text async for c in llm.astream("Once", SHORT)]

    assert asyncio.run(main()) == [c.text for c in llm.stream("Once", SHORT)]


def test_conversations_and_several_answers(llm):
    chat = [{"role": "user", "content": "Hi"}]
    params = SamplingParams(n=3, seed=1, max_tokens=4)
    out = asyncio.run(llm.agenerate(chat, params))
    assert [a.text for a in out.outputs] == [a.text for a in llm.chat(chat, params)[0].outputs]


def test_mistakes_come_at_the_call(llm):
    async def main():
        with pytest.raises(InvalidRequestError):
            llm.astream("")
        with pytest.raises(InvalidRequestError):
            await llm.agenerate(["a", "b"])

    asyncio.run(main())
    assert all_free(llm)


def test_cancelling_frees_everything(llm):
    async def main():
        task = asyncio.create_task(llm.agenerate("Once", LONG))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async for _ in llm.astream("Once", LONG):
            break
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(llm.agenerate("Once", LONG), 0.02)
        cancelled = asyncio.create_task(llm.agenerate("Once", LONG))
        cancelled.cancel()  # before it began
        await asyncio.gather(cancelled, return_exceptions=True)
        return await llm.agenerate("Once", SHORT)

    assert asyncio.run(main()).finished
    assert all_free(llm)


def test_the_event_loop_never_waits_for_a_step(llm, monkeypatch):
    run = llm._engine.runner.run

    def slow(*args):
        time.sleep(0.2)
        return run(*args)

    async def main():
        running = asyncio.create_task(llm.agenerate("Once", SamplingParams(max_tokens=4, ignore_eos=True)))
        await asyncio.sleep(0.05)
        begin = time.perf_counter()
        stream = llm.astream("Two", SHORT)
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        waited = time.perf_counter() - begin
        await running
        return waited

    monkeypatch.setattr(llm._engine.runner, "run", slow)
    assert asyncio.run(main()) < 0.1
    monkeypatch.undo()
    assert all_free(llm)


def test_a_slow_reader_holds_nobody_up(llm):
    async def main():
        slow = llm.astream("Once", LONG)
        await anext(slow)
        done = await asyncio.wait_for(llm.agenerate("Two", SHORT), 10)
        rest = [c async for c in slow]
        return done.finished, 1 + sum(len(c.token_ids) for c in rest)

    assert asyncio.run(main()) == (True, 200)


def test_sync_and_async_callers_share_the_engine_and_both_go_on(llm):
    """The thread that steps for async code must not keep the caller of generate() out."""
    times = []

    async def main():
        task = asyncio.create_task(llm.agenerate("Once", LONG))
        await asyncio.sleep(0.02)

        def sync():
            for _ in range(5):
                begin = time.perf_counter()
                llm.generate("Two", SamplingParams(max_tokens=1))
                times.append((time.perf_counter() - begin, task.done()))

        await asyncio.to_thread(sync)
        return await task

    assert len(asyncio.run(main()).outputs[0].token_ids) == 200
    assert not times[0][1], "the long answer was to be still running"


def test_threads_generate_at_once(llm):
    results = {}

    def ask(i):
        results[i] = llm.generate([f"Thread {i}", "x"], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert {i: r[0].prompt for i, r in results.items()} == {i: f"Thread {i}" for i in range(4)}
    assert all(len(o.outputs[0].token_ids) == 20 for r in results.values() for o in r)
    assert all_free(llm)


def test_closing_ends_whoever_waits(dummy_folder):
    llm = load(dummy_folder)

    async def main():
        tasks = [asyncio.create_task(llm.agenerate(p, LONG)) for p in "abc"]
        await asyncio.sleep(0.05)
        await asyncio.to_thread(llm.close)
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)

    errors = asyncio.run(main())
    assert [type(e) for e in errors] == [EngineClosedError] * 3
    assert "closed while it answered" in str(errors[0])
    with pytest.raises(EngineClosedError):
        asyncio.run(llm.agenerate("a"))


def test_closing_ends_a_generate_in_another_thread(dummy_folder):
    llm, caught = load(dummy_folder), []

    def ask():
        with pytest.raises(EngineClosedError) as error:
            llm.generate(["a"] * 64, LONG)
        caught.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.1)
    llm.close()
    thread.join(10)
    assert caught


@pytest.mark.parametrize("beyond_repair", [False, True], ids=["", "nor is there memory to begin anew"])
def test_a_broken_step_reaches_every_reader(llm, monkeypatch, beyond_repair):
    def broken(*args):
        raise RuntimeError("the device is gone")

    async def main():
        first = asyncio.create_task(llm.agenerate("a", LONG))
        await asyncio.sleep(0.05)
        monkeypatch.setattr(llm._engine.runner, "run", broken)
        if beyond_repair:
            monkeypatch.setattr(llm._engine.runner, "attach", broken)
        result = await asyncio.wait_for(asyncio.gather(first, return_exceptions=True), 10)
        monkeypatch.undo()
        if beyond_repair:
            llm._engine.recover()
        again = await asyncio.wait_for(llm.agenerate("a", SHORT), 10)
        return result[0], again

    error, again = asyncio.run(main())
    assert isinstance(error, EngineError)
    assert isinstance(error.__cause__, RuntimeError)
    assert "the device is gone" in str(error)
    assert again.finished
    assert all_free(llm)


def test_a_loop_that_is_gone_stops_nobody(llm):
    loop = asyncio.new_event_loop()
    stream = llm.astream("Once", LONG)
    loop.run_until_complete(anext(stream))
    loop.close()
    assert asyncio.run(llm.agenerate("Two", SHORT)).finished
    deadline = time.time() + 10
    while not all_free(llm) and time.time() < deadline:
        time.sleep(0.01)
    assert all_free(llm)
    assert llm._driver._thread.is_alive()


def test_the_engine_is_told_who_reads_along(llm, monkeypatch):
    """For whose sake it keeps steps short."""
    told, add = [], llm._engine.add
    monkeypatch.setattr(llm._engine, "add", lambda request: (told.append(request.read_along), add(request)))

    async def read() -> None:
        await llm.agenerate("a", SHORT)
        assert [c async for c in llm.astream("a", SHORT)]

    llm.generate(["a", "b"], SHORT.clone(n=2))
    llm.chat([{"role": "user", "content": "a"}], SHORT)
    llm.embed("a")
    assert list(llm.stream("a", SHORT))
    asyncio.run(read())
    assert told == [False] * 6 + [True] + [False, True]
