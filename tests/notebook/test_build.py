"""The builder: two builds give the same bytes, nothing of the machine stays, and broken notebooks are refused."""

import copy
import sys
import tempfile

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from llmkit.notebook.build import (
    METADATA,
    NotebookBuildError,
    build,
    problems,
    sanitise,
    serialise,
    stamp_of,
    steady,
    steady_svg,
    translate,
    zh_problems,
)

CODE = """\
import os, sys, time, tempfile, llmkit
import matplotlib.pyplot as plt
print(object(), "pid", os.getpid(), tempfile.mkdtemp(), sys.prefix, time.time() % 10, "s, 12.5 tokens/s")
plt.plot([1, 2]); plt.title("中文"); plt.show()
llmkit.check("tier is cpu", tier == "cpu")"""


def make(*cells):
    return new_notebook(cells=list(cells), metadata=copy.deepcopy(METADATA), nbformat_minor=5)


@pytest.fixture
def path(tmp_path):
    metadata = {"tags": ["parameters"], "scrolled": True}
    parameters = new_code_cell('tier: str = "auto"  # where', id="nb-parameters", metadata=metadata)
    nb = make(new_markdown_cell("# Title", id="nb-title"), parameters, new_code_cell(CODE, id="nb-run"))
    nbformat.write(nb, tmp_path / "nb.ipynb")
    return tmp_path / "nb.ipynb"


def test_two_builds_are_byte_for_byte_equal_and_carry_nothing_of_the_machine(path):
    assert build(path) == [path]
    first = path.read_text("utf-8")
    build(path)
    assert path.read_text("utf-8") == first
    nb = nbformat.read(path, as_version=4)
    assert [c.id for c in nb.cells] == ["nb-title", "nb-parameters", "nb-run"]
    assert nb.metadata == METADATA
    assert [c.execution_count for c in nb.cells[1:]] == [1, 2]
    assert problems(nb) == []
    for private in (tempfile.gettempdir() + "/tmp", sys.prefix, "papermill", '"scrolled"'):
        assert private not in first
    assert nb.cells[2].outputs[0].text == "<object object at 0x…> pid … /tmp/… <environment> … s, … tokens/s\n"


def test_a_failing_notebook_is_not_written(path):
    nb = nbformat.read(path, as_version=4)
    nb.cells[2].source = "1 / 0"
    nbformat.write(nb, path)
    before = path.read_bytes()
    with pytest.raises(NotebookBuildError, match="ZeroDivisionError: division by zero"):
        build(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(("text", "steadied"), [
    ("ready on 127.0.0.1:43127 (port 43127)", "ready on 127.0.0.1:… (port …)"),
    ("took 1.25 s, 3 ms; 7 s are prose", "took … s, … ms; 7 s are prose"),
    ("1,234.5 tokens/s at 61.0 GB/s", "… tokens/s at … GB/s"),
    ('{"id":"chatcmpl-d9f4e9661bdf4f3eb74fd99f2251c5e3","created":1795366907}', '{"id":"chatcmpl-…","created":…}'),
    ("block 12 of 4096", "block 12 of 4096"),
])
def test_what_differs_between_runs_is_replaced(text, steadied):
    assert steady(text) == steadied


def test_cells_tagged_measured_keep_their_numbers():
    out = new_output("stream", name="stdout", text="12.5 tokens/s at 0x7f1234567890")
    cell = new_code_cell("x", id="nb-speed", metadata={"tags": ["measured"]}, outputs=[out], execution_count=9)
    assert sanitise(make(cell)).cells[0].outputs[0].text == "12.5 tokens/s at 0x…"


def test_streams_are_merged_and_progress_keeps_its_last_state():
    pieces = [new_output("stream", name="stdout", text=t) for t in ("10%\r50%", "\r100%\nend", "\n")]
    data = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "w"}
    view = new_output("display_data", data=data, metadata={"isolated": 1})
    outputs = sanitise(make(new_code_cell("x", id="nb-x", outputs=[*pieces, view]))).cells[0].outputs
    assert outputs[0].text == "100%\nend\n"
    assert outputs[1].data == {"text/plain": "w"}
    assert outputs[1].metadata == {}


def test_svg_ids_are_numbered_in_order():
    svg = '<path id="m0a1b2c3d4e"/><use xlink:href="#m0a1b2c3d4e" clip-path="url(#pdeadbeef01)"/><clipPath id="pdeadbeef01"/>'
    steadied = '<path id="nb-x-0"/><use xlink:href="#nb-x-0" clip-path="url(#nb-x-1)"/><clipPath id="nb-x-1"/>'
    assert steady_svg(f"<dc:date>2026-01-01</dc:date>{svg}", "nb-x") == f"<dc:date></dc:date>{steadied}"


@pytest.mark.parametrize(("change", "problem"), [
    (lambda nb: nb.metadata.update(widgets={}), "metadata holds more"),
    (lambda nb: nb.cells[0].update(id="1b9d6bcd-bbfd-4b2d-9b5d-ab8dfbbd4bed"), "is not a slug"),
    (lambda nb: nb.cells[0].update(id="b9d6bcda"), "is not a slug"),
    (lambda nb: nb.cells[0].update(id="nb-code"), "used twice"),
    (lambda nb: nb.cells[1].outputs.append(new_output("error", ename="E", evalue="", traceback=[])), "an error output"),
    (lambda nb: nb.cells[1].outputs.append(new_output("stream", text="x" * 60_001)), "an output has 60,001 bytes"),
    (lambda nb: nb.cells[0].update(source="x" * 200_001), "the notebook has"),
    (lambda nb: nb.cells[1].metadata.update(papermill={}), "metadata 'papermill'"),
])
def test_what_may_not_be_committed_is_named(change, problem):
    nb = make(new_markdown_cell("text", id="nb-text"), new_code_cell("1", id="nb-code"))
    assert problems(nb) == []
    change(nb)
    assert any(problem in found for found in problems(nb)), problems(nb)


# ---- the Chinese twin

EN = make(new_markdown_cell("# Hello", id="nb-a"), new_code_cell("1", id="nb-b", outputs=[new_output("stream", text="1")]))
ZH = translate(EN, make(new_markdown_cell("# 你好", id="nb-a")), stamp=True)


def test_a_twin_has_english_code_and_outputs_and_chinese_prose():
    assert ZH.cells[0].source == "# 你好"
    assert ZH.cells[0].metadata == {"llmkit": {"source": stamp_of("# Hello")}}
    assert ZH.cells[1] == EN.cells[1]
    assert zh_problems(EN, ZH) == []
    assert problems(ZH) == []


def test_a_changed_or_new_english_cell_leaves_the_twin_stale_until_it_is_stamped():
    changed = copy.deepcopy(EN)
    changed.cells[0].source = "# Hello, you"
    changed.cells.append(new_markdown_cell("More", id="nb-c"))
    rebuilt = translate(changed, ZH)
    assert rebuilt.cells[0].source == "# 你好"
    assert zh_problems(changed, rebuilt) == ["cell nb-a: translation is stale", "cell nb-c: translation is stale"]
    assert zh_problems(changed, translate(changed, rebuilt, stamp=True)) == []


def test_differences_between_twins_are_found():
    other = copy.deepcopy(ZH)
    other.cells[1].source = "2"
    assert zh_problems(EN, other) == ["cell nb-b: code differs"]
    other.cells[1].source, other.cells[1].outputs = "1", []
    assert zh_problems(EN, other) == ["cell nb-b: outputs differ"]
    del other.cells[1]
    assert "missing ['nb-b']" in zh_problems(EN, other)[0]


def test_build_rewrites_the_twin_beside(path):
    twin = path.parent / "zh" / "nb.ipynb"
    twin.parent.mkdir()
    nbformat.write(make(new_markdown_cell("# 标题", id="nb-title")), twin)
    assert build(path, stamp=True) == [path, twin]
    english, chinese = (nbformat.read(p, as_version=4) for p in (path, twin))
    assert zh_problems(english, chinese) == []
    before = [p.read_text("utf-8") for p in (path, twin)]
    build(path, run=False)
    assert [p.read_text("utf-8") for p in (path, twin)] == before
    assert before[0] == serialise(english)
