"""What a server's processes hold when they are ready is looked at by the garbage collector no more."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from llmkit.server.processes import engine_process
from llmkit.server.processes.garbage import spare_what_is_there


class Knot:
    """Refers to itself, so only the collector frees it."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_comes_later_is_still_collected_and_what_was_garbage_is_gone():
    before = weakref.ref(Knot())
    spare_what_is_there()
    assert before() is None
    assert len(gc.get_objects()) < gc.get_freeze_count()
    later = weakref.ref(Knot())
    gc.collect()
    assert later() is None


def test_an_engine_that_is_ready_is_spared(monkeypatch):
    spared: list[int] = []

    class Server:
        def run(self) -> None:
            spared.append(gc.get_freeze_count())

    monkeypatch.setattr(engine_process, "_start", lambda control, begin: Server())
    engine_process._start_and_run(None, 0.0)  # type: ignore[arg-type]
    assert spared[0] > 0
