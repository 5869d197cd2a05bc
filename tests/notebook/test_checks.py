"""check and record outside a kernel (in one: test_run.py), and show_source."""

import json

import numpy as np
import pytest

import llmkit
from llmkit.errors import CheckFailed, ConfigError, did_you_mean
from llmkit.notebook.checks import SCRAP_MIME, plain, read_scraps


def test_plain_python_prints_and_raises(capsys):
    llmkit.check("two is two", 2 == 2)
    llmkit.record("speed", 1.5)
    with pytest.raises(CheckFailed, match=r"'two is three' does not hold(?s:.)*count again"):
        llmkit.check("two is three", 2 == 3, hint="count again")
    assert capsys.readouterr().out == "✓ two is two\nspeed = 1.5\n✗ two is three\n"


def test_everything_is_added_to_the_results_file(tmp_path, monkeypatch):
    target = tmp_path / "new" / "results.json"
    monkeypatch.setenv("LLMKIT_RESULTS", str(target))
    llmkit.check("a", True)
    llmkit.record("b", {"k": (1, np.float32(2))})
    with pytest.raises(CheckFailed):
        llmkit.check("c", [])
    assert json.loads(target.read_text("utf-8")) == {"checks": {"a": True, "c": False}, "records": {"b": {"k": [1, 2.0]}}}


def test_only_what_json_holds_is_recorded():
    assert plain({1: np.arange(2), "p": None, "t": (True, "文")}) == {"1": [0, 1], "p": None, "t": [True, "文"]}
    with pytest.raises(TypeError, match="record\\(\\) holds JSON values; got object"):
        plain([object()])


def test_scraps_written_by_scrapbook_are_read_too():
    scrap = {"name": "x", "data": 3, "encoder": "json", "version": 1}
    outputs = [{"output_type": "stream", "text": "hi"}, {"output_type": "display_data", "data": {SCRAP_MIME: scrap}}]
    assert read_scraps(outputs) == ({}, {"x": 3})


def test_show_source_shows_code_place_and_colours():
    shown = llmkit.show_source(did_you_mean)
    assert repr(shown).startswith("# llmkit/errors.py:")
    assert "def did_you_mean(name: str" in repr(shown)
    assert "highlight" in shown._repr_html_()
    assert repr(llmkit.show_source(llmkit)).startswith("# llmkit/__init__.py:1\n")


@pytest.mark.parametrize("thing", [len, 3, dict])
def test_show_source_refuses_what_has_no_source(thing):
    with pytest.raises(ConfigError, match="no Python source"):
        llmkit.show_source(thing)
