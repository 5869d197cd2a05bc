"""Python and the packages llmkit stands on: present, and of a version in the range that pyproject.toml names?"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import platform
import sys
import tomllib
from pathlib import Path
from typing import Any

import llmkit
from llmkit.doctor.report import Finding, fail, ok

PROJECT = Path(llmkit.__file__).resolve().parents[1] / "pyproject.toml"  # in a checkout, which may be ahead of its metadata


def python() -> list[Finding]:
    """Its version, and which one it is: a notebook often runs in another than the terminal."""
    from packaging.specifiers import SpecifierSet

    wanted, version = SpecifierSet(_python_range()), platform.python_version()
    where = f"{version} in {sys.prefix}"
    if wanted.contains(version, prereleases=True):
        return [ok("python", where)]
    return [fail("python", f"{where}: llmkit runs on {_words(wanted)}", "conda env create -f environment.yml")]


def torch() -> list[Finding]:
    """Its version and what it was built for, read from its files: importing it takes seconds."""
    problem = missing("torch")
    if problem:
        return [problem]
    return [ok("torch", f"{version_of('torch')}, {torch_build()[1]}")]


def transformers() -> list[Finding]:
    """Its version."""
    return [missing("transformers") or ok("transformers", version_of("transformers") or "")]


def packages() -> list[Finding]:
    """The other packages that llmkit always needs."""
    names = [r.name for r in requirements() if r.name not in ("torch", "transformers")]
    wrong = [finding for name in names if (finding := missing(name))]
    if not wrong:
        return [ok("packages", f"the {len(names)} others are here, in the right versions")]
    specs = [f'"{r}"' for r in requirements() if r.name in {f.name for f in wrong}]
    return [fail("packages", "; ".join(f"{f.name}: {f.detail}" for f in wrong), f"pip install {' '.join(specs)}")]


def torch_build() -> tuple[str, str]:
    """(`cuda`, `rocm` or `cpu`; the same in words)."""
    values = _literals(Path(importlib.util.find_spec("torch").origin or "").with_name("version.py"))  # type: ignore[union-attr]
    if values.get("cuda"):
        return "cuda", f"built for CUDA {values['cuda']}"
    if values.get("hip"):
        return "rocm", f"built for ROCm {values['hip']}"
    return "cpu", "built for CPUs" if sys.platform != "darwin" else "built for CPUs and Apple's GPUs"


def missing(name: str, extra: str = "") -> Finding | None:
    """A FAIL when a required package is absent or out of range; None when it is right."""
    need = next(r for r in requirements(extra) if r.name == name)
    version = version_of(name)
    if version and need.specifier.contains(version, prereleases=True):
        return None
    what = f"{version} is installed; llmkit needs {need.specifier}" if version else "not installed"
    return fail(name, what, f'pip install "{need}"')


def requirements(extra: str = "") -> list[Any]:
    """packaging's Requirement of each dependency, or of each one that `extra` adds; those for other platforms are left out."""
    from packaging.requirements import Requirement

    def wanted(lines: list[str], extra: str) -> list[Any]:
        found = [Requirement(line) for line in lines]
        return [r for r in found if r.marker is None or r.marker.evaluate({"extra": extra})]

    if PROJECT.exists():
        return wanted(_project()["optional-dependencies"][extra] if extra else _project()["dependencies"], extra)
    lines = importlib.metadata.requires("llmkit") or []
    always = wanted(lines, "")
    return [r for r in wanted(lines, extra) if r not in always] if extra else always


def version_of(name: str) -> str | None:
    """The version of an installed distribution. Imports nothing of it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def install_extra(extra: str) -> str:
    """The command that installs one of llmkit's extras."""
    return f'pip install -e ".[{extra}]"' if PROJECT.exists() else f'pip install "llmkit[{extra}]"'


def short(path: Path) -> str:
    """`path` as people write it: ~ for the home folder."""
    home = Path.home()
    return str(Path("~") / path.relative_to(home)) if len(home.parts) > 1 and path.is_relative_to(home) else str(path)


def _project() -> dict[str, Any]:
    return tomllib.loads(PROJECT.read_text("utf-8"))["project"]


def _python_range() -> str:
    return _project()["requires-python"] if PROJECT.exists() else importlib.metadata.metadata("llmkit")["Requires-Python"]


def _words(wanted: Any) -> str:
    return "Python " + ", ".join(sorted(map(str, wanted), reverse=True))


def _literals(path: Path) -> dict[str, Any]:
    """The constants a Python file assigns, without running it."""
    found: dict[str, Any] = {}
    for node in ast.parse(path.read_text("utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        value = getattr(node, "value", None)
        found |= {t.id: value.value for t in targets if isinstance(t, ast.Name) and isinstance(value, ast.Constant)}
    return found
