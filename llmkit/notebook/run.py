"""Run a notebook without a browser, by papermill, in a kernel of the interpreter that runs this.

Which kernels the user has registered does not matter: a fresh virtual environment has none, a shared machine has the wrong one.
"""

from __future__ import annotations

import ast
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llmkit
from llmkit.errors import LlmkitError, UnknownOptionError, did_you_mean
from llmkit.notebook.checks import RESULTS_VARIABLE, read_scraps

OnOutput = Callable[[Mapping[str, Any] | None], None]  # each output as it comes, None at the end of a cell


class NotebookNotFoundError(LlmkitError, FileNotFoundError):
    """A notebook file that does not exist."""


class MissingExtraError(LlmkitError, ImportError):
    """A package of an optional extra is not installed."""


@dataclass
class RunResult:
    """What a run left.

    path: the executed notebook. seconds: wall clock. checks, records: by name. error: None, or what failed.
    """

    path: Path
    seconds: float
    checks: dict[str, bool] = field(default_factory=dict)
    records: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None and all(self.checks.values())


def run_notebook(path: str | os.PathLike[str], parameters: Mapping[str, Any] | None = None,
                 out_dir: str | os.PathLike[str] = "runs", on_output: OnOutput | None = None) -> RunResult:
    """Execute the notebook at `path` into `out_dir`, and say what it recorded. A failed run keeps the executed notebook.

    parameters: values for names of the notebook's `parameters` cell; another name raises UnknownOptionError. A parameter called
    `out_dir` is given the folder of the run. on_output: called with each output (nbformat) as it comes, and with None at the end
    of a cell; a display that is updated comes once, at the end, in its last state.
    """
    source, out = Path(path).resolve(), Path(out_dir).resolve()
    known = notebook_parameters(source)
    given = dict(parameters or {})
    _reject_unknown(given, known, source)
    if "out_dir" in known:
        given.setdefault("out_dir", str(out))
    out.mkdir(parents=True, exist_ok=True)
    executed, results = out / source.name, out / f"{source.stem}.results.json"
    if executed == source:
        raise LlmkitError(f"{source.name} would be overwritten by its own run", "give another out_dir")
    results.unlink(missing_ok=True)
    start = time.perf_counter()
    error = _execute(source, executed, given, _kernel_environment(results), on_output)
    seconds = time.perf_counter() - start
    checks, records = read_scraps(o for c in read_notebook(executed).cells for o in c.get("outputs", ()))
    return RunResult(executed, seconds, checks, records, error)


def read_notebook(path: str | os.PathLike[str]) -> Any:
    """The notebook at `path` as an nbformat node, or an error that says what is wrong with the file."""
    nbformat = _need("nbformat")
    try:
        return nbformat.read(os.fspath(path), as_version=4)
    except FileNotFoundError as e:
        near = did_you_mean(Path(path).name, [p.name for p in Path(path).parent.glob("*.ipynb")])
        hint = f"did you mean {near!r}?" if near else None
        raise NotebookNotFoundError(f"there is no notebook {os.fspath(path)}", hint) from e
    except (ValueError, KeyError, AttributeError, nbformat.ValidationError, IsADirectoryError) as e:
        raise LlmkitError(f"{os.fspath(path)} is not a notebook: {type(e).__name__}: {e}", "give an .ipynb file") from e


def notebook_parameters(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Names and default values of the cell tagged `parameters`; a default that is not a literal is given as its source text."""
    cells = [c for c in read_notebook(path).cells if c.cell_type == "code" and "parameters" in c.metadata.get("tags", ())]
    return {name: value for cell in cells for name, value in _assignments(cell.source)}


def _assignments(code: str) -> list[tuple[str, Any]]:
    found = []
    for node in ast.parse(code).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        value = getattr(node, "value", None)
        found += [(t.id, _literal(value)) for t in targets if isinstance(t, ast.Name) and value is not None]
    return found


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _reject_unknown(given: Mapping[str, Any], known: Mapping[str, Any], source: Path) -> None:
    for name in given:
        if name not in known:
            near = did_you_mean(name, known)
            hint = f"did you mean {near!r}?" if near else f"it has: {', '.join(known) or 'none'}"
            raise UnknownOptionError(f"{source.name} has no parameter {name!r}", hint)


def _execute(source: Path, executed: Path, parameters: dict[str, Any], environment: dict[str, str],
             on_output: OnOutput | None) -> str | None:
    """Run `source` into `executed`; the error of the cell that failed, or None."""
    papermill = _need("papermill")
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    _register_engine()
    try:
        papermill.execute_notebook(
            _unformatted(source), _unformatted(executed), parameters=parameters, engine_name="llmkit", kernel_name="python3",
            language="python", progress_bar=False, cwd=str(source.parent), environment=environment,
            on_output=on_output or (lambda output: None))
    except papermill.PapermillExecutionError as e:
        return f"{e.ename}: {e.evalue}" if e.evalue else str(e.ename)
    except (DeadKernelError, CellTimeoutError) as e:
        return f"{type(e).__name__}: {e}"
    return None


def _unformatted(path: Path) -> str:
    """papermill passes paths through str.format."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _register_engine() -> None:
    """A papermill engine whose kernel is this interpreter, and which hands on each output as it comes."""
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import NBClientEngine, papermill_engines

    class LiveClient(PapermillNotebookClient):
        def __init__(self, listener: OnOutput, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.listener, self.held = listener, []  # held: displays that may still be updated

        def process_message(self, msg: Any, *args: Any, **kwargs: Any) -> Any:
            if msg["content"].get("execution_state") == "idle":
                self.tell(*self.held, None)
                self.held = []
            output = super().process_message(msg, *args, **kwargs)
            if output is not None and msg["content"].get("transient", {}).get("display_id"):
                self.held.append(output)
            elif output is not None:
                self.tell(output)
            return output

        def tell(self, *outputs: Any) -> None:
            for output in outputs:
                self.listener(output)

    class LiveEngine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, *, environment: dict[str, str],  # type: ignore[override]
                                     on_output: OnOutput, **_: Any) -> Any:
            kernel = current_kernel(environment)
            client = LiveClient(on_output, nb_man, kernel_manager_class=kernel, timeout=None, kernel_name=kernel_name)
            return client.execute()

    papermill_engines.register("llmkit", LiveEngine)


def current_kernel(environment: Mapping[str, str]) -> Any:
    """A kernel manager class that starts ipykernel in this interpreter, with `environment` added and figures inline as SVG."""
    _need("ipykernel")
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    spec = KernelSpec(
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--InlineBackend.figure_formats=svg",
              "--IPKernelApp.log_level=CRITICAL"],  # local TCP, sockets closed by an interrupt: not for the reader of a run
        display_name="Python 3", language="python", env=dict(environment))

    class CurrentInterpreter(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            return spec

    return CurrentInterpreter


def _kernel_environment(results: Path) -> dict[str, str]:
    """The kernel imports the very llmkit that is running here, draws reproducibly, and shows widgets as their static twins."""
    return {
        "PYTHONPATH": os.pathsep.join([*checkout_roots(), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "MATPLOTLIBRC": str(Path(__file__).with_name("matplotlibrc")),
        "SOURCE_DATE_EPOCH": os.environ.get("SOURCE_DATE_EPOCH", "0"),  # matplotlib dates its SVG by it
        "LLMKIT_WIDGETS": "0",
        RESULTS_VARIABLE: str(results),
    }


def checkout_roots() -> list[str]:
    """The import roots of the checkout this llmkit runs from; none when it is installed as a wheel."""
    house = Path(llmkit.__file__).resolve().parents[1]
    return [str(house), str(house / "kernels")] if (house / "pyproject.toml").exists() else []


def _need(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        raise MissingExtraError(f"running notebooks needs {module}", 'in the checkout: pip install -e ".[notebook]"') from e
