"""Ends: drained, hurried, with the process that started it."""

from __future__ import annotations

import signal
import subprocess
import threading

import psutil
import pytest


class Reader(threading.Thread):
    """Reads one stream to its end."""

    def __init__(self, server, **options):
        super().__init__()
        self.server, self.options, self.begun, self.found = server, options, threading.Event(), []
        self.start()
        assert self.begun.wait(20)

    def run(self):
        with self.server.stream(**self.options) as response:
            for event in self.server.events(response):
                self.found.append(event)
                self.begun.set()

    @property
    def last(self):
        self.join(20)
        assert not self.is_alive()
        return self.found[-1]["choices"][0]["finish_reason"]


@pytest.mark.parametrize(("number", "fronts"), [(signal.SIGTERM, "1"), (signal.SIGINT, "1"), (signal.SIGTERM, "2")])
def test_open_requests_may_end(start, number, fronts):
    server = start("--shutdown-timeout", "30", "--api-server-count", fronts).ready()
    reader = Reader(server, max_tokens=500)
    server.process.send_signal(number)
    assert reader.last == "length"
    assert server.wait() == 0
    assert server.state["state"] == "stopping"
    assert "Traceback" not in server.log.read_text()


def test_after_the_timeout_they_end_with_what_they_have(start):
    server = start("--shutdown-timeout", "0.3").ready()
    reader = Reader(server, max_tokens=8000)
    server.process.terminate()
    assert reader.last == "abort"
    assert server.text_of(reader.found)
    assert server.wait() == 0


def test_a_second_signal_is_heard_at_once(start):
    server = start("--shutdown-timeout", "300").ready()
    reader = Reader(server, max_tokens=8000)
    server.process.terminate()
    server.until("the drain", lambda: server.state["state"] == "stopping")
    server.process.terminate()
    assert reader.last == "abort"
    assert server.wait(5) == 128 + signal.SIGTERM


@pytest.mark.parametrize("fronts", ["1", "2"])
def test_a_start_can_be_stopped(start, fronts):
    server = start("--api-server-count", fronts)
    server.until("the engine process", lambda: psutil.Process(server.process.pid).children())
    server.remember()
    server.process.terminate()
    assert server.wait(10) == 0
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("ready", [True, False])
def test_it_ends_when_its_stdin_does(start, ready):
    server = start("--watch-stdin", stdin=subprocess.PIPE)
    if ready:
        server.ready()
        reader = Reader(server, max_tokens=8000)
    else:
        server.until("the engine process", lambda: psutil.Process(server.process.pid).children())
    server.remember()
    server.process.stdin.close()
    assert server.wait(10) == 0
    if ready:
        assert reader.last == "abort"


def test_without_the_flag_stdin_is_of_no_account(start):
    server = start(stdin=subprocess.PIPE)
    server.process.stdin.close()
    server.ready()
    assert server.complete(max_tokens=2)
