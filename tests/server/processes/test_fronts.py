"""Several fronts on one port."""

from __future__ import annotations

import signal

import httpx
import psutil
import pytest


@pytest.fixture(scope="module")
def pair(start_once):
    return start_once("--api-server-count", "2", "--engine-timeout", "4")


def processes(server):
    named = {p: words_of(p) for p in server.remember()}
    fronts = [p for p, words in named.items() if "front_process" in words]
    (engine,) = [p for p, words in named.items() if "engine_process" in words]
    return fronts, engine


def words_of(process):
    """Its command line; none of one that has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def ask_both(server, path="/server_info"):
    """pid -> answer, by connections of their own until both fronts have been met."""
    met = {}

    def ask():
        answer = httpx.get(server.url + path)
        met[answer.raise_for_status().json()["pid"]] = answer.json()
        return len(met) == 2

    server.until("both fronts", ask)
    return met


def test_both_answer_and_say_the_same(pair):
    fronts, _ = processes(pair)
    assert set(ask_both(pair)) == {f.pid for f in fronts}
    assert len({pair.complete(max_tokens=20)["choices"][0]["text"] for _ in range(6)}) == 1


def test_no_front_imports_torch(pair):
    for front in processes(pair)[0]:
        assert not any("libtorch" in m.path for m in front.memory_maps())


def test_one_that_is_killed_takes_only_its_own_requests_and_is_replaced(pair):
    fronts, engine = processes(pair)
    with pair.stream(max_tokens=1900) as response:
        reader = pair.events(response)
        next(reader)
        owner = next(f for f in fronts if any(c.raddr and c.status == "ESTABLISHED" for c in f.net_connections("tcp")))
        other = next(f for f in fronts if f != owner)
        other.kill()
        assert sum(1 for _ in reader) > 1000
    pair.until("two fronts", lambda: len(processes(pair)[0]) == 2 and other not in processes(pair)[0])
    assert len(ask_both(pair)) == 2
    for fact in ask_both(pair).values():
        assert fact["healthy"]
    assert engine.is_running()


def test_the_engine_frees_what_a_killed_front_had_asked_for(pair):
    fronts, engine = processes(pair)
    before = engine.pid
    with pair.stream(max_tokens=2000) as response:
        reader = pair.events(response)
        next(reader)
        for front in fronts:
            front.kill()
        with pytest.raises(httpx.RemoteProtocolError):
            list(reader)
    psutil.wait_procs(fronts, 10)
    assert pair.get("/health").status_code == 200  # who comes now waits for the next front, and is not sent away
    assert len(ask_both(pair)) == 2
    pair.until("free blocks", lambda: pair.stats().get("running") == 0, 5)
    assert processes(pair)[1].pid == before


def test_a_front_that_takes_the_place_of_another_is_met_when_it_can_answer(pair):
    dead, other = processes(pair)[0]
    dead.kill()
    psutil.wait_procs([dead], 10)
    answers = []

    def the_new_one_answers():
        answers.append(pair.get("/server_info"))
        return answers[-1].status_code != 200 or answers[-1].json()["pid"] not in (dead.pid, other.pid)

    pair.until("the new front", the_new_one_answers)
    assert {a.status_code for a in answers} == {200}
    assert answers[-1].json()["healthy"]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_an_engine_that_ends_is_replaced_for_both(pair, end):
    _, engine = processes(pair)
    engine.send_signal(end)
    psutil.wait_procs([engine], 10)
    pair.until("the news", lambda: all(not a["healthy"] or a["engine_pid"] != engine.pid for a in ask_both(pair).values()))
    pair.until("health", lambda: all(a["healthy"] for a in ask_both(pair).values()))
    assert len({a["engine_pid"] for a in ask_both(pair).values()} - {engine.pid}) == 1


def test_they_end_together_and_wait_for_nothing_that_runs_in_the_background(start):
    server = start("--api-server-count", "2", "--shutdown-timeout", "0").ready()
    asked = {"input": "Hi", "max_output_tokens": 8000, "ignore_eos": True, "background": True}
    assert server.http.post(f"{server.url}/v1/responses", json=asked).json()["status"] == "in_progress"
    server.process.terminate()
    assert server.wait(15) == 0
    assert "Traceback" not in server.log.read_text()
