"""`llmkit demo`: from nothing to an answer. Fetch the default model, run the first notebook with it, show what it says."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import llmkit
from llmkit.config import DEFAULT_MODEL
from llmkit.errors import LlmkitError

if TYPE_CHECKING:
    from llmkit.notebook.run import RunResult

NOTEBOOK = "02_offline_generate.ipynb"


def demo(out_dir: str | os.PathLike[str] = "runs") -> int:
    """Run the demo; 0 when every check of the notebook holds, else 1. The executed notebook is left in `out_dir`."""
    from llmkit.cli import Screen, show_path
    from llmkit.hub import resolve
    from llmkit.notebook.run import notebook_parameters, run_notebook

    notebook = notebooks_folder() / NOTEBOOK
    parameters = {"tier": "cpu"} if "tier" in notebook_parameters(notebook) else {}
    print(f"1. Fetching the model {DEFAULT_MODEL}", flush=True)
    start = time.perf_counter()
    print(f"   {resolve(DEFAULT_MODEL)} ({time.perf_counter() - start:.1f} s)")
    print(f"2. Running {show_path(notebook)}\n", flush=True)
    result = run_notebook(notebook, parameters, out_dir, on_output=Screen())
    print(summary(result))
    return 0 if result.ok else 1


def summary(result: RunResult) -> str:
    """What the run showed: checks, speeds, time, and where the executed notebook is."""
    from llmkit.cli import result_line, show_path

    speeds = [f"  {name} = {value:.1f}" for name, value in result.records.items()
              if "tokens_per_second" in name and isinstance(value, (int, float))]
    return "\n".join(["", result_line(result), *speeds, f"  open it: jupyter lab {show_path(result.path)}"])


def notebooks_folder() -> Path:
    """The course: beside the package in a checkout, or in the current folder."""
    for folder in (Path(llmkit.__file__).resolve().parents[1] / "notebooks", Path.cwd() / "notebooks"):
        if (folder / NOTEBOOK).exists():
            return folder
    raise LlmkitError(f"notebooks/{NOTEBOOK} is not here: llmkit was installed without its notebooks",
                      'run this in a checkout of the repository: pip install -e ".[notebook]" && llmkit demo')
