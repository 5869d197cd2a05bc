"""Ctrl-C and Jupyter's stop button: this call ends, its blocks are free, what it had is kept, the next call works."""

import os
import signal
import subprocess
import sys
import time

import pytest
from own_process import environment
from real_kernel import Kernel

from llmkit import LLM, SamplingParams
from llmkit.errors import EngineError
from llmkit.interrupt import interrupt_afterwards

LONG = SamplingParams(temperature=0, max_tokens=4000, ignore_eos=True)
LOAD = 'LLM(FOLDER, load_format="dummy", max_model_len=4096, max_num_seqs=16, kv_cache_memory=0.05)'


@pytest.fixture(scope="module")
def llm(dummy_folder):
    with LLM(dummy_folder, load_format="dummy", max_model_len=4096, max_num_seqs=16, kv_cache_memory=0.05) as llm:
        yield llm


@pytest.fixture
def interrupt_soon(llm, monkeypatch):
    """SIGINT to this process inside the 20th step from now."""
    run, steps = llm._engine.runner.run, []

    def counting(*args):
        steps.append(1)
        if len(steps) == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return run(*args)

    return lambda: monkeypatch.setattr(llm._engine.runner, "run", counting)


def usable(llm):
    stats = llm.stats()
    assert stats["kv_blocks_free"] == stats["kv_blocks_total"]
    assert stats["running"] == stats["waiting"] == 0
    assert len(llm.generate("Again", SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids) == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_during_generate(llm, interrupt_soon):
    interrupt_soon()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["One", "Two"], LONG)
    assert [o.outputs[0].finish_reason for o in llm.last_partial] == ["abort", "abort"]
    assert all(len(o.outputs[0].token_ids) == 20 and o.outputs[0].text for o in llm.last_partial)
    assert "finish_reason='abort'" in repr(llm.last_partial)
    assert len(repr(llm.last_partial)) < 3000
    usable(llm)


def test_during_stream(llm, interrupt_soon):
    interrupt_soon()
    chunks = []
    with pytest.raises(KeyboardInterrupt):
        chunks.extend(llm.stream("One", LONG))
    assert llm.last_partial[0].outputs[0].text.startswith("".join(map(str, chunks)))
    assert len(llm.last_partial[0].outputs[0].token_ids) == 20
    usable(llm)


def test_a_stream_left_early(llm):
    stream = llm.stream("One", LONG)
    first = next(stream)
    stream.close()
    assert llm.last_partial[0].outputs[0].text.startswith(first.text)
    usable(llm)


def test_steps_left_early(llm):
    for _ in llm.step_through(["One", "Two"], LONG):
        break
    usable(llm)


def test_before_anything_ran(llm, monkeypatch):
    """An interrupt while the requests are queued must not leave them there."""
    submit = llm._driver.submit

    def interrupted(jobs):
        submit(jobs)
        raise KeyboardInterrupt

    monkeypatch.setattr(llm._driver, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("One", LONG)
    monkeypatch.undo()
    usable(llm)


@pytest.mark.parametrize("cause", [RuntimeError("broken"), KeyboardInterrupt()], ids=["error", "second interrupt"])
def test_a_step_that_breaks(llm, monkeypatch, cause):
    run, steps, caught = llm._engine.runner.run, [], []

    def breaking(*args):
        steps.append(1)
        if len(steps) == 4:
            raise cause
        return run(*args)

    monkeypatch.setattr(llm._engine.runner, "run", breaking)
    other = llm.stream("Somebody else's", LONG)
    next(other)
    with pytest.raises(type(cause)):
        llm.generate("One", LONG)
    monkeypatch.undo()
    assert len(llm.last_partial[0].outputs[0].token_ids) == 2
    with pytest.raises(EngineError):
        caught += list(other)
    assert [c.finish_reason for c in caught] == []
    usable(llm)


def test_the_block_runs_to_its_end():
    done = []

    @interrupt_afterwards()
    def inner():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        done.append("inner")

    @interrupt_afterwards()
    def outer():
        inner()
        done.append("outer")

    with pytest.raises(KeyboardInterrupt):
        outer()
    assert done == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_goes_through_at_once():
    done = []

    @interrupt_afterwards()
    def interrupted_twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            done.append(1)

    with pytest.raises(KeyboardInterrupt):
        interrupted_twice()
    assert done == [1]


def test_a_program_that_ignores_interrupts_is_left_alone():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupt_afterwards():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_it_costs_microseconds():
    begin = time.perf_counter()
    for _ in range(2000):
        with interrupt_afterwards():
            done = True
    assert done
    assert (time.perf_counter() - begin) / 2000 < 200e-6


# ---- processes of their own


def test_sigint_into_a_script(dummy_folder):
    script = f"""
import sys
from llmkit import LLM, SamplingParams
FOLDER = sys.argv[1]
llm = {LOAD}
print("ready", flush=True)
try:
    llm.generate(["One"] * 3, SamplingParams(max_tokens=4000, ignore_eos=True))
except KeyboardInterrupt:
    stats = llm.stats()
    print(len(llm.last_partial), stats["kv_blocks_free"] == stats["kv_blocks_total"])
print(len(llm.generate("Again", SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(dummy_folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(),
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert out == "3 True\n3\n", err
    assert "Traceback" not in err


@pytest.fixture(scope="module")
def kernel(dummy_folder):
    kernel = Kernel(f"FOLDER = {str(dummy_folder)!r}\nfrom llmkit import LLM, SamplingParams")
    yield kernel
    kernel.close()


def test_in_a_notebook(kernel):
    """One kernel from load to close, for each start costs seconds."""
    loaded = kernel.run(f"llm = {LOAD}\nlong = SamplingParams(max_tokens=4000, ignore_eos=True)")
    assert [(o["type"], o["name"]) for o in loaded] == [("stream", "stdout")]  # stderr would be a red block
    assert loaded[0]["text"].startswith("llmkit: ")

    cell = kernel.begin("llm.generate(['One'] * 3, long)")
    time.sleep(1.0)
    kernel.interrupt()
    said = kernel.messages(cell)
    assert [o["ename"] for o in said if o["type"] == "error"] == ["KeyboardInterrupt"]

    assert free_and_working(kernel) == "3 True 3"
    assert finished_progress(said).startswith("0/3 requests")
    shown = kernel.run("llm.last_partial")[-1]["data"]
    assert shown["text/html"].count("abort") == 3
    assert "RequestOutput(" in shown["text/plain"]

    bar = kernel.run("out = llm.generate(['One'] * 3, SamplingParams(max_tokens=3, ignore_eos=True))")
    assert finished_progress(bar).startswith("3/3 requests")
    assert len({o["transient"]["display_id"] for o in bar}) == 1

    few = "[llm.agenerate(p, SamplingParams(max_tokens=3)) for p in 'abc']"
    gathered = f"import asyncio\nprint(len(await asyncio.gather(*{few})))"
    assert kernel.text(gathered) == "3"
    cell = kernel.begin("await llm.agenerate('One', long)")
    time.sleep(0.5)
    kernel.interrupt()
    assert any(o["type"] == "error" for o in kernel.messages(cell))
    assert free_and_working(kernel) == "3 True 3"

    error = kernel.run("llm.generate('')")[-1]
    assert error["type"] == "error"
    assert len(error["traceback"]) <= 3
    assert "the prompt is empty" in error["traceback"][0]


def free_and_working(kernel):
    check = """
stats = llm.stats()
again = llm.generate("Again", SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids
print(len(llm.last_partial), stats["kv_blocks_free"] == stats["kv_blocks_total"], len(again))
"""
    return kernel.text(check)


def finished_progress(messages):
    return [o for o in messages if o["type"] == "update_display_data"][-1]["data"]["text/plain"]
