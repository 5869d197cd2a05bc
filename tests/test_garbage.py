"""What is imported, and what a server's processes hold when they are ready, is not looked at by the garbage collector."""

from __future__ import annotations

import gc
import importlib
import weakref
from collections.abc import Iterator

import pytest

from llmkit.garbage import nothing_is_garbage, spare_what_is_there
from llmkit.server.processes import engine_process


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


@pytest.fixture
def passes() -> Iterator[list[int]]:
    """The generation of each pass of the collector."""
    seen: list[int] = []
    note = lambda phase, info: seen.append(info["generation"]) if phase == "start" else None
    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


def test_what_is_made_in_the_block_is_looked_at_neither_there_nor_soon_after(passes):
    with nothing_is_garbage():
        kept = [[i] for i in range(10 * gc.get_threshold()[0])]
        with nothing_is_garbage():  # one import within another
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    assert not passes
    assert not any(kept is young for young in gc.get_objects(0) + gc.get_objects(1))


def test_garbage_of_the_block_goes_with_the_next_full_pass():
    with nothing_is_garbage():
        knot = weakref.ref(Knot())
    assert knot() is not None
    gc.collect()
    assert knot() is None


def test_an_import_that_fails_leaves_the_collector_on():
    with pytest.raises(ModuleNotFoundError), nothing_is_garbage():
        importlib.import_module("llmkit.nowhere")
    assert gc.isenabled()


def test_who_keeps_the_collector_off_or_froze_objects_is_left_alone():
    gc.disable()
    try:
        with nothing_is_garbage():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
    mine = [[]]
    gc.freeze()
    with nothing_is_garbage():
        pass
    assert gc.get_freeze_count() > 0
    assert not any(looked_at is mine for looked_at in gc.get_objects())


def test_an_engine_that_is_ready_is_spared(monkeypatch):
    spared: list[int] = []

    class Server:
        def run(self) -> None:
            spared.append(gc.get_freeze_count())

    monkeypatch.setattr(engine_process, "_start", lambda control, begin: Server())
    engine_process._start_and_run(None, 0.0)  # type: ignore[arg-type]
    assert spared[0] > 0
