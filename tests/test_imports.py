"""`import llmkit` is cheap and needs nothing installed but Python."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import llmkit

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "tokenizers", "numpy", "gguf", "huggingface_hub", "modelscope_hub", "IPython", "papermill"}


def python(code: str) -> str:
    """What a fresh interpreter prints that finds this checkout."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout


def test_import_takes_less_than_300_ms():
    code = "import time; t = time.perf_counter(); import llmkit; print(time.perf_counter() - t)"
    assert min(float(python(code)) for _ in range(3)) < 0.3


MODULES = ["llmkit", "llmkit.cli", "llmkit.demo", "llmkit.notebook.checks", "llmkit.notebook.run", "llmkit_kernels"]


@pytest.mark.parametrize("module", MODULES)
def test_import_loads_nothing_heavy(module):
    loaded = set(python(f"import sys, {module}; print(*sys.modules)").split())
    assert loaded & HEAVY == set()


def test_a_servers_front_needs_no_torch():
    modules = "llmkit.server.processes.launch, llmkit.server.processes.front_process, llmkit.server.app"
    loaded = set(python(f"import sys, {modules}; print(*sys.modules)").split())
    assert loaded & {"torch", "transformers"} == set()


def test_the_version_and_the_words_users_read_need_no_torch():
    block = f"import sys\nfor name in {HEAVY}: sys.modules[name] = None\n"
    words = "llmkit.__version__, llmkit.SamplingParams(temperature=0).greedy, llmkit.EngineConfig().max_logprobs"
    assert python(f"{block}import llmkit; print({words})") == f"{llmkit.__version__} True 20\n"


@pytest.mark.parametrize("name", llmkit.__all__)
def test_every_public_name_exists(name):
    assert getattr(llmkit, name) is not None
    assert name in dir(llmkit)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        llmkit.LMM  # noqa: B018
