"""The engine in a process of its own: what it gives back, when its clients leave, when it dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil


def blocks_are_free(server):
    stats = server.stats()
    return stats["running"] == stats["waiting"] == 0 and stats["kv_blocks_free"] == stats["kv_blocks_total"]


def test_pieces_joined_equal_the_whole_answer(server):
    whole = server.complete(max_tokens=100, logprobs=2)
    with server.stream(max_tokens=100, logprobs=2) as response:
        found = list(server.events(response))
    assert server.text_of(found) == whole["choices"][0]["text"]
    pieces = [e["choices"][0]["logprobs"] for e in found if e["choices"][0]["logprobs"]]
    for name in ("tokens", "token_logprobs", "top_logprobs"):
        assert [item for p in pieces for item in p[name]] == whole["choices"][0]["logprobs"][name]
    assert len(whole["choices"][0]["logprobs"]["tokens"]) == 100


def test_a_stop_string_ends_the_answer_on_both_sides(server):
    whole = server.complete(max_tokens=60)["choices"][0]["text"]
    stop = whole[len(whole) // 2 :][:6]
    choice = server.complete(max_tokens=1500, stop=[stop])["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (whole[: whole.index(stop)], "stop", stop)
    server.until("free blocks", lambda: blocks_are_free(server), 2)


def test_several_answers_of_one_prompt_and_several_prompts(server):
    asked = {"prompt": ["a b c", "d e f"], "n": 3, "temperature": 1.0, "max_tokens": 8, "seed": 5}
    answer = server.complete(**asked)
    texts = [c["text"] for c in answer["choices"]]
    assert [c["index"] for c in answer["choices"]] == list(range(6))
    assert len(set(texts)) == 6
    assert texts == [c["text"] for c in server.complete(**asked)["choices"]]


def test_fifty_cut_streams_leave_nothing(server):
    def cut(i):
        with server.stream(prompt=f"request {i}", max_tokens=1900) as response:
            next(server.events(response))

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(cut, range(50)))
    server.until("free blocks", lambda: blocks_are_free(server), 2)


def test_two_hundred_streams_at_once_all_complete_and_unmixed(server):
    def ask(i):
        with server.stream(prompt=f"{i} is", max_tokens=20) as response:
            return server.text_of(list(server.events(response)))

    alone = {i: server.complete(prompt=f"{i} is", max_tokens=20)["choices"][0]["text"] for i in (0, 57, 199)}
    with ThreadPoolExecutor(200) as pool:
        texts = list(pool.map(ask, range(200)))
    assert {i: texts[i] for i in alone} == alone
    assert texts == list(ThreadPoolExecutor(20).map(ask, range(200)))
    server.until("free blocks", lambda: blocks_are_free(server), 2)


def test_a_slow_reader_holds_up_nobody_and_gets_everything(server):
    whole = server.complete(prompt="slow", max_tokens=1500, logprobs=5)
    with server.stream(prompt="slow", max_tokens=1500, logprobs=5) as slow:  # more than the sockets' buffers hold
        reader = server.events(slow)
        first = next(reader)
        begin = time.monotonic()
        server.complete(prompt="quick", max_tokens=50)
        assert time.monotonic() - begin < 10
        server.until("the end of the slow answer", lambda: server.stats()["running"] == 0, 30)
        found = [first, *reader]
    assert server.text_of(found) == whole["choices"][0]["text"]


def test_an_engine_that_is_killed_is_replaced_and_every_client_hears_of_it(server):
    (engine,) = server.remember()
    outcomes: list[list] = []

    def ask(i):
        with server.stream(prompt=f"request {i}", max_tokens=1900) as response:
            outcomes.append([response.status_code, *server.events(response)])

    clients = [threading.Thread(target=ask, args=(i,)) for i in range(20)]
    for client in clients:
        client.start()
    server.until("twenty streams", lambda: server.stats().get("running", 0) == 20)
    engine.kill()
    for client in clients:
        client.join(10)
    assert len(outcomes) == 20
    for status, *found in outcomes:
        assert status == 200
        assert found[0]["id"]
        assert found[-1]["error"]["type"] == "service_unavailable_error"
    refused = server.http.post(f"{server.url}/v1/completions", json=server.body())
    health = server.get("/health")
    if server.info()["healthy"] is False:  # it is back within seconds
        assert (refused.status_code, health.status_code) == (503, 503)
        assert refused.headers["Retry-After"]
        assert refused.headers["X-Request-Id"]
    server.until("health", server.healthy)
    assert server.complete(max_tokens=3)["choices"][0]["finish_reason"] == "length"
    (successor,) = server.remember()
    assert successor.pid != engine.pid
    assert "the engine process was killed by SIGKILL; another one is started" in server.log.read_text()


def test_an_engine_that_dies_before_it_answers_is_a_failed_start(start):
    server = start()
    server.until("the engine process", lambda: psutil.Process(server.process.pid).children())
    server.remember()[0].kill()
    assert server.wait() == 1
    assert server.state["error"]["type"] == "EngineUnavailableError"
    assert server.state["error"]["message"] == "the engine process was killed by SIGKILL"
    assert "out of memory" in server.state["error"]["hint"]


def test_the_engine_goes_with_its_server_however_that_ends(start):
    server = start().ready()
    (engine,) = server.remember()
    with server.stream(max_tokens=1900) as response:
        next(server.events(response))
        os.kill(server.process.pid, signal.SIGKILL)
    psutil.wait_procs([engine], 5)
    assert not engine.is_running()


def test_too_many_requests_are_refused(start):
    server = start("--max-queued-requests", "2").ready()
    with server.stream(max_tokens=1900) as one, server.stream(max_tokens=1900) as two:
        readers = [server.events(one), server.events(two)]
        assert all(next(reader) for reader in readers)
        refused = server.http.post(f"{server.url}/v1/completions", json=server.body())
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "queue_full"
        assert refused.headers["Retry-After"]
    server.until("room", lambda: server.http.post(f"{server.url}/v1/completions", json=server.body()).status_code == 200, 5)


def test_a_request_may_take_so_long(start):
    server = start("--request-timeout", "0.5").ready()
    refused = server.http.post(f"{server.url}/v1/completions", json=server.body(max_tokens=8000))
    assert (refused.status_code, refused.json()["error"]["type"]) == (504, "timeout_error")
    server.until("free blocks", lambda: blocks_are_free(server), 2)
