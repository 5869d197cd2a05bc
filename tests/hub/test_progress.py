"""One bar, three places: terminal, notebook kernel, log file."""

import io
import sys
import threading
import types

import pytest

from llmkit.hub import progress as module
from llmkit.hub.cache import size_text
from llmkit.hub.progress import progress


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


def test_sizes_for_people():
    assert [size_text(n) for n in (0, 999, 98_362_432, 2.5e9, 3e12)] == ["0 B", "999 B", "98.4 MB", "2.5 GB", "3.0 TB"]
