"""Engines come and go: two in one process, ten after another, forgotten ones, and the end of the interpreter."""

import asyncio
import gc
import subprocess
import sys
import time
import weakref

import pytest
from own_process import environment

from llmkit import LLM, SamplingParams, driver
from llmkit.errors import ConfigError

SHORT = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def load(folder, **options):
    return LLM(folder, **{"load_format": "dummy", "max_model_len": 256, "kv_cache_memory": 0.02} | options)


def test_two_engines_live_side_by_side(dummy_folder):
    with load(dummy_folder, seed=1) as one:
        alone = one.generate("Hello", SHORT)[0].outputs[0].token_ids
        with load(dummy_folder, seed=2) as two:

            async def main():
                return await asyncio.gather(one.agenerate("Hello", SHORT), two.agenerate("Hello", SHORT))

            first, second = asyncio.run(main())
            assert first.outputs[0].token_ids == alone
            assert second.outputs[0].token_ids != alone
        assert one.generate("Hello", SHORT)[0].outputs[0].token_ids == alone


TEN = """
import asyncio, gc, sys
import psutil
from llmkit import LLM, SamplingParams
short = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
for _ in range(10):
    with LLM(sys.argv[1], load_format=sys.argv[2], max_model_len=256, kv_cache_memory=0.1) as llm:
        llm.generate(["Hello " * 150] * 8, short, use_tqdm=False)
        asyncio.run(llm.agenerate("Hello", short))
    gc.collect()
    print(psutil.Process().memory_info().rss / 2**20)
"""


@pytest.mark.parametrize("weights", ["dummy", "auto"])
def test_ten_leave_nothing(dummy_folder, smollm2_folder, weights):
    """In a process of their own: the heap of this one is torn by hundreds of tests."""
    folder = dummy_folder if weights == "dummy" else smollm2_folder
    done = subprocess.run([sys.executable, "-c", TEN, str(folder), weights], capture_output=True, text=True, timeout=120,
                          env=environment())  # fmt: skip
    sizes = [float(size) for size in done.stdout.split()]
    assert len(sizes) == 10, done.stderr
    assert sizes[-1] - sizes[2] < 60, sizes


ONE = """
import sys
import psutil
from llmkit import LLM, SamplingParams
def held():
    return psutil.Process().memory_info().rss / 2**20
print(held())
with LLM(sys.argv[1]) as llm:
    llm.generate(["Hello " * 150] * 8, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False)
    print(held())
print(held())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc to let go of what was freed")
def test_closing_gives_the_weights_memory_to_the_system(smollm2_folder):
    done = subprocess.run([sys.executable, "-c", ONE, str(smollm2_folder)], capture_output=True, text=True, timeout=120,
                          env=environment())  # fmt: skip
    before, loaded, closed = map(float, done.stdout.split())
    assert loaded - before > 260, "the weights have 257 MiB"
    assert closed - before < 120, "libraries that were loaded on the way, and what they keep"


def test_a_forgotten_one_is_freed(dummy_folder, new_threads):
    llm = load(dummy_folder)
    asyncio.run(llm.agenerate("Hello", SHORT))
    assert len(new_threads("llmkit-steps")) == 1
    gone = [weakref.ref(x) for x in (llm, llm._engine, llm._engine.runner.kv_cache)]
    del llm
    assert [g() for g in gone] == [None] * 3
    deadline = time.time() + 5
    while new_threads() and time.time() < deadline:
        time.sleep(0.01)
    assert new_threads() == []


def test_outputs_do_not_keep_the_engine(dummy_folder):
    llm = load(dummy_folder)
    engine = weakref.ref(llm._engine)
    kept = llm.generate(["Hello"] * 2, SHORT), list(llm.stream("Hello", SHORT)), llm.startup_report(), llm.memory_plan()
    kept += (list(llm.step_through("Hello", SHORT)),)
    llm.close()
    assert engine() is None
    assert kept[1][-1].output().finished


def test_a_failed_load_leaves_nothing(dummy_folder, new_threads):
    before = len(gc.get_objects())
    for _ in range(3):
        with pytest.raises(ConfigError, match="max_model_len"):
            load(dummy_folder, max_model_len=10**9)
    gc.collect()
    assert new_threads() == []
    assert len(gc.get_objects()) - before < 20_000


def test_finished_requests_are_forgotten(dummy_folder):
    with load(dummy_folder) as llm:
        llm.generate(["Hello"] * 30, SHORT)
        stream = llm.stream("Hello", SHORT)
        next(stream)
        del stream
        assert llm._driver._jobs == {}
        assert llm._driver._in_background == set()
        assert not any(llm._engine.rows.requests)
        assert list(llm._engine.scheduler.unfinished()) == []


def ends_quietly(code, folder, expect=0):
    begin = f"""
import asyncio, sys, threading, time
from llmkit import LLM, SamplingParams
llm = LLM({str(folder)!r}, load_format="dummy", max_model_len=4096, kv_cache_memory=0.05)
long = SamplingParams(max_tokens=4000, ignore_eos=True)
"""
    done = subprocess.run([sys.executable, "-c", begin + code], capture_output=True, text=True, timeout=60,
                          env=environment())  # fmt: skip
    assert done.returncode == expect, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr  # the line at load
    return done.stdout


def test_the_interpreter_ends_while_a_thread_steps(dummy_folder):
    code = """
loop = asyncio.new_event_loop()
stream = llm.astream("Once", long)
loop.run_until_complete(anext(stream))
print("bye")
"""
    assert ends_quietly(code, dummy_folder) == "bye\n"


def test_the_interpreter_ends_while_a_daemon_generates(dummy_folder):
    code = """
def ask():
    try:
        llm.generate("Once", long)
    except RuntimeError as error:
        print(type(error).__name__)
threading.Thread(target=ask, daemon=True).start()
time.sleep(0.2)
sys.exit(3)
"""
    ends_quietly(code, dummy_folder, expect=3)


def test_only_the_last_engine_on_a_gpu_clears_what_the_graphs_of_others_write_to(dummy_folder, monkeypatch):
    """cuBLAS's workspaces, which are of all streams at once. Here the engines only pretend to be on one."""
    cleared: list[int] = []
    monkeypatch.setattr("torch._C._cuda_clearCublasWorkspaces", lambda: cleared.append(len(driver._on_gpus)), raising=False)
    a, b = load(dummy_folder), load(dummy_folder)
    driver._on_gpus.update((a._driver, b._driver))
    a.close()
    a.close()
    assert not cleared
    b.close()
    assert cleared == [0]
