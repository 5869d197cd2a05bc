"""One bar, three places: terminal, notebook kernel, log file."""

import io
import sys
import threading
import types

import pytest

from llmkit.hub import progress as module
from llmkit.hub.cache import size_text
from llmkit.hub.progress import Meter, duration_text, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(total=4_000_000) -> None:
    with progress(total, "thing") as bar:
        for _ in range(4):
            bar.update(1_000_000)


def test_a_log_file_gets_one_line_at_the_end(capsys):
    run()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [err.strip()]
    assert err.startswith("thing: 4.0 MB in ")


def test_failure_is_not_shown_as_done_and_nothing_is_shown_for_nothing(capsys):
    def fail(size):
        with progress(4_000_000, "thing") as bar:
            bar.update(size)
            raise ValueError

    with pytest.raises(ValueError):
        fail(1_000_000)
    assert capsys.readouterr().err.startswith("thing: 1.0 MB of 4.0 MB stopped after ")
    with pytest.raises(ValueError):
        fail(0)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_tqdm(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    run()
    assert "thing: 100%" in sys.stderr.getvalue()


def test_a_notebook_gets_one_display_whose_final_state_is_saved(monkeypatch):
    shown = []

    class Handle:
        def update(self, bundle, raw):
            shown[-1] = bundle

    def display(bundle, raw, display_id):
        assert raw
        assert display_id
        shown.append(bundle)
        return Handle()

    shell = types.SimpleNamespace(kernel=object())
    fake = types.ModuleType("IPython")
    fake.get_ipython = lambda: shell
    fake.display = types.ModuleType("IPython.display")
    fake.display.display = display
    monkeypatch.setitem(sys.modules, "IPython", fake)
    monkeypatch.setitem(sys.modules, "IPython.display", fake.display)
    run()
    (bundle,) = shown
    assert bundle["text/plain"].startswith("thing: 4.0 MB in")
    assert 'max="4000000" value="4000000"' in bundle["text/html"]


def test_ipython_in_a_terminal_is_not_a_notebook(monkeypatch):
    fake = types.ModuleType("IPython")
    fake.get_ipython = lambda: types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "IPython", fake)
    assert not module.in_notebook()


def test_counts_from_many_threads(capsys):
    with progress(None, "thing") as bar:
        threads = [threading.Thread(target=lambda: [bar.update(1) for _ in range(5000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert bar.done == 20_000
    bar.expect(5)
    assert bar.total == 5


def test_files_speed_and_time_left(capsys, monkeypatch):
    monkeypatch.setattr(module.Bar, "seconds", 2.0)
    bar = module.Bar(10_000_000, "thing", files=3)
    meter = Meter(bar, {"a": 4_000_000, "b": 6_000_000}, {"a": 1_000_000})
    meter.at("a", 1_000_000)
    meter.at("a", 4_000_000)
    assert bar.text() == "thing: 4.0 MB of 10.0 MB · 1 of 3 files · 1.5 MB/s · 4 s left · 1.0 MB were here"
    bar.say("interrupted, going on")
    assert bar.text().endswith(" · interrupted, going on")
    meter.at("b", 6_000_000)
    bar.files_done += 1
    assert bar.text(ended=True) == "thing: 10.0 MB in 2.0 s · 3 files · 4.5 MB/s · 1.0 MB were here"


def test_a_file_that_begins_anew_is_counted_as_received_and_not_as_resumed():
    bar = module.Bar(10, "thing")
    meter = Meter(bar, {"a": 10}, {"a": 4})
    for position in (4, 6, 0, 3, 10):
        meter.at("a", position)
    assert (bar.done, bar.received, bar.resumed, bar.files_done) == (10, 12, 0, 1)


def test_a_long_download_shows_life_in_a_log_file(capsys, monkeypatch):
    monkeypatch.setattr(module.Bar, "redraw_seconds", 0.0)
    run()
    assert len(capsys.readouterr().err.splitlines()) == 5


def test_durations_for_people():
    assert [duration_text(s) for s in (0.4, 8, 89, 180, 7500)] == ["0 s", "8 s", "89 s", "3 min", "2 h 05 min"]


def test_sizes_for_people():
    assert [size_text(n) for n in (0, 999, 98_362_432, 2.5e9, 3e12)] == ["0 B", "999 B", "98.4 MB", "2.5 GB", "3.0 TB"]
