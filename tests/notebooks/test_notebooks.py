"""Every committed notebook runs at tier=cpu and holds its checks; every Chinese twin says the same in Chinese."""

import ast
import re
from pathlib import Path

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from llmkit.notebook.build import problems, zh_problems
from llmkit.notebook.run import read_notebook, run_notebook

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def written_checks(nb):
    """Names in the notebook's own `check("name", ...)` calls; a name made at run time could not be missed, so it is refused."""
    python = TransformerManager().transform_cell  # magics are calls too
    trees = [ast.walk(ast.parse(python(c.source))) for c in nb.cells if c.cell_type == "code"]
    every_call = [n for tree in trees for n in tree if isinstance(n, ast.Call)]
    calls = [c for c in every_call if getattr(c.func, "attr", getattr(c.func, "id", "")) == "check"]
    assert all(c.args and isinstance(c.args[0], ast.Constant) for c in calls), "check() needs its name written out"
    return {c.args[0].value for c in calls}


@pytest.mark.slow
@each_notebook
def test_runs_at_tier_cpu_and_every_written_check_holds(path, tmp_path):
    nb = read_notebook(path)
    result = run_notebook(path, {"tier": "cpu"}, tmp_path)
    assert result.error is None
    assert set(result.checks) == written_checks(nb)
    assert all(result.checks.values())
    assert len(result.checks) >= 3, "a notebook shows at least three things that must hold"


@each_notebook
def test_may_be_committed_as_it_is(path):
    nb = read_notebook(path)
    assert problems(nb) == []
    missing = [c.id for c in nb.cells if c.cell_type == "code" and c.source and c.execution_count is None]
    assert missing == [], "outputs are kept: llmkit notebooks build"


@each_notebook
def test_no_picture_is_clipped_by_another_ones_frame(path):
    """A page that holds several SVGs, as nbconvert writes it, knows each id once."""
    for nb in (read_notebook(path), read_notebook(FOLDER / "zh" / path.name)):
        data = [o.data for c in nb.cells if c.cell_type == "code" for o in c.outputs if "data" in o]
        found = [i for d in data for i in re.findall(r'<clipPath id="([^"]+)"', d.get("image/svg+xml", ""))]
        assert sorted(set(found)) == sorted(found)


@each_notebook
def test_has_an_up_to_date_chinese_twin(path):
    twin = FOLDER / "zh" / path.name
    assert twin.exists(), f"notebooks/zh/{path.name} is missing"
    assert zh_problems(read_notebook(path), read_notebook(twin)) == []
    assert problems(read_notebook(twin)) == []


def test_no_chinese_notebook_without_an_english_one():
    assert {p.name for p in (FOLDER / "zh").glob("*.ipynb")} <= {p.name for p in NOTEBOOKS}
