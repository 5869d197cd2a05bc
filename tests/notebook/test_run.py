"""run_notebook: parameters, records and checks, failures, the kernel it uses."""

import json
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from llmkit.errors import LlmkitError, UnknownOptionError
from llmkit.notebook.run import NotebookNotFoundError, notebook_parameters, run_notebook

PARAMETERS = 'tier: str = "cpu"  # where it runs\nseed: int = 0\nout_dir: str = "runs"\nsizes = [1, 2]'


@pytest.fixture
def notebook(tmp_path):
    """A function that writes a notebook of these code cells (the first is `parameters`) and gives its path."""

    def write(*cells, name="nb.ipynb"):
        tagged = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), *map(new_code_cell, cells)]
        path = tmp_path / name
        nbformat.write(new_notebook(cells=[new_markdown_cell("# A notebook"), *tagged]), path)
        return path

    return write


def test_parameters_are_read_without_running_anything(notebook):
    assert notebook_parameters(notebook()) == {"tier": "cpu", "seed": 0, "out_dir": "runs", "sizes": [1, 2]}


def test_a_run_returns_checks_records_and_the_executed_notebook(notebook, tmp_path):
    path = notebook("import sys, llmkit\nprint('live', seed)",
                    "llmkit.record('python', sys.executable)\nllmkit.record('dir', out_dir)",
                    "llmkit.check('seed is given', seed == 7)", name="with {braces}.ipynb")
    seen = []
    result = run_notebook(path, {"seed": 7}, tmp_path / "runs", on_output=lambda o: seen.append(o))
    assert result.error is None
    assert result.ok
    assert result.checks == {"seed is given": True}
    assert result.records == {"python": sys.executable, "dir": str(tmp_path / "runs")}
    assert result.path == tmp_path / "runs" / path.name
    assert nbformat.read(result.path, as_version=4).cells[-1].outputs[0].data["text/plain"] == "✓ seed is given"
    assert next(o for o in seen if o)["text"] == "live 7\n"
    assert seen.count(None) == 5, "one at the end of each cell, papermill's own among them"
    saved = json.loads((tmp_path / "runs" / "with {braces}.results.json").read_text("utf-8"))
    assert saved == {"checks": result.checks, "records": result.records}


def test_a_failed_run_keeps_the_executed_notebook_and_what_was_recorded(notebook, tmp_path):
    checks = ["check('first', True)", "check('second', False, 'look here')", "check('third', True)"]
    path = notebook(*[f"import llmkit\nllmkit.{c}" for c in checks])
    result = run_notebook(path, out_dir=tmp_path / "runs")
    assert not result.ok
    assert result.checks == {"first": True, "second": False}
    assert result.error is not None
    assert "check 'second' does not hold" in result.error
    errors = [o for c in nbformat.read(result.path, as_version=4).cells for o in c.get("outputs", ()) if o.output_type == "error"]
    assert errors[0].ename == "CheckFailed"
    assert errors[0].traceback[1:] == ["  -> look here"], "a short error: message and hint, no stack"


def test_an_updated_display_comes_once_and_in_its_last_state(notebook, tmp_path):
    first, last = (f"{{'text/plain': '{percent}'}}, raw=True" for percent in (0, 100))
    seen = []
    path = notebook(f"d = display({first}, display_id=True)\nprint('x')\nd.update({last})")
    run_notebook(path, {}, tmp_path / "runs", on_output=seen.append)
    assert [o.get("text") or o.data["text/plain"] for o in seen if o] == ["x\n", "100"]


def test_a_kernel_that_dies_is_an_error_of_the_run(notebook, tmp_path):
    result = run_notebook(notebook("import os\nos._exit(3)"), out_dir=tmp_path / "runs")
    assert result.error is not None
    assert "DeadKernelError" in result.error
    assert result.path.exists()


def test_an_unknown_parameter_is_refused_with_the_nearest(notebook, tmp_path):
    with pytest.raises(UnknownOptionError, match=r"no parameter 'sed'(?s:.)*did you mean 'seed'"):
        run_notebook(notebook(), {"sed": 1}, tmp_path / "runs")


def test_a_missing_or_broken_notebook_is_named(notebook, tmp_path):
    notebook(name="02_offline_generate.ipynb")
    with pytest.raises(NotebookNotFoundError, match=r"did you mean '02_offline_generate\.ipynb'"):
        run_notebook(tmp_path / "02_offline_generat.ipynb")
    for text in ("not json", "[]", "{}"):
        (tmp_path / "broken.ipynb").write_text(text)
        with pytest.raises(LlmkitError, match="is not a notebook"):
            run_notebook(tmp_path / "broken.ipynb", out_dir=tmp_path / "runs")


def test_a_run_never_overwrites_its_source(notebook, tmp_path):
    path = notebook()
    with pytest.raises(LlmkitError, match="overwritten"):
        run_notebook(path, out_dir=tmp_path)


def test_figures_are_reproducible_svg_with_a_font_for_chinese(notebook, tmp_path):
    plot = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.title('x')\nplt.show()\nprint(plt.rcParams['font.sans-serif'])"
    path = notebook(plot)
    first, second = (nbformat.read(run_notebook(path, out_dir=tmp_path / d).path, as_version=4).cells[-1].outputs for d in "ab")
    assert "image/svg+xml" in first[0].data
    assert first[0].data["image/svg+xml"] == second[0].data["image/svg+xml"]
    assert "Noto Sans CJK SC" in first[1].text
