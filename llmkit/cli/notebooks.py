"""`llmkit demo | run | notebooks build`: notebooks without a browser."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.cli.parser import Parser, UsageError, command

if TYPE_CHECKING:
    from llmkit.notebook.run import RunResult


def add(commands: Any) -> None:
    """demo, run, notebooks."""
    _add_demo(commands)
    _add_run(commands)
    _add_notebooks(commands)


def _add_demo(commands: Any) -> None:
    p = command(commands, "demo", "fetch the default model, run a notebook with it, and show the answers", _demo)
    p.add_argument("--out", metavar="DIR", default="runs", help="folder for the executed notebook (default: runs)")


def _demo(args: argparse.Namespace) -> int:
    from llmkit.demo import demo

    return demo(args.out)


def _add_run(commands: Any) -> None:
    p = command(commands, "run", "execute notebooks without a browser; --name value pairs after them are their parameters", _run,
                 takes_parameters=True)
    p.add_argument("notebooks", metavar="NOTEBOOK", nargs="+", help="an .ipynb file")
    p.add_argument("-p", "--parameter", dest="parameters", metavar="NAME=VALUE", action="append",
                   help="a notebook parameter; may be repeated")
    p.add_argument("--tier", choices=("cpu", "gpu", "multi-gpu", "auto"),
                   help="the notebooks' tier parameter: model, sizes and assertions")
    p.add_argument("--out", metavar="DIR", default="runs", help="folder for the executed notebooks (default: runs)")
    p.add_argument("-v", "--verbose", action="store_true", help="show the notebooks' output as it comes")


def _run(args: argparse.Namespace) -> int:
    from llmkit.notebook.run import run_notebook

    listener, results = Screen() if args.verbose else None, []
    for notebook in args.notebooks:
        results.append(run_notebook(notebook, _notebook_parameters(args, notebook), args.out, listener))
        print(result_line(results[-1]), flush=True)
    return 0 if all(r.ok for r in results) else 1


def result_line(result: RunResult) -> str:
    """One run in one line, and its error in another."""
    counts = f"{sum(result.checks.values())} of {len(result.checks)} checks"
    line = f"{'✓' if result.ok else '✗'} {result.path.stem} · {counts} · {result.seconds:.1f} s · {show_path(result.path)}"
    return line + (f"\n  {result.error}" if result.error else "")


def show_path(path: Path) -> str:
    """A path as short as it can be typed here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


class Screen:
    """Shows a running notebook in the terminal; what follows a streamed answer begins on a line of its own."""

    def __init__(self) -> None:
        self.unfinished = False  # the cursor stands behind text

    def __call__(self, output: Any) -> None:
        text = output_text(output) if output else ""
        if self.unfinished and (output is None or (text and output["output_type"] != "stream")):
            text = "\n" + text
        if text:
            self.unfinished = not text.endswith("\n")
            print(text, end="", flush=True)


def output_text(output: Any) -> str:
    """What a terminal can show of a notebook output: streams and texts, but neither pictures nor objects' addresses."""
    if output["output_type"] == "stream":
        return output["text"] if output["name"] == "stdout" else ""
    data = output.get("data", {})
    text = data.get("text/plain", "")
    return "" if not text or text.startswith("<") or any(mime.startswith("image/") for mime in data) else text + "\n"


def _notebook_parameters(args: argparse.Namespace, notebook: str) -> dict[str, Any]:
    from llmkit.notebook.run import notebook_parameters

    known, given = notebook_parameters(notebook), [f"tier={args.tier}"] if args.tier else []
    pairs = [p.partition("=") for p in given + (args.parameters or [])]
    if bad := [name for name, equals, _ in pairs if not equals]:
        raise UsageError(f"-p needs NAME=VALUE; got {bad[0]!r}")
    return {name: _value(text, known.get(name)) for name, _, text in pairs}


def _value(text: str, default: Any) -> Any:
    """`text` as the parameter's kind: a text stays a text, anything else is read as a Python literal when it is one."""
    if isinstance(default, str):
        return text
    try:
        return ast.literal_eval({"true": "True", "false": "False", "null": "None"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def loose_parameters(parser: Parser, unknown: list[str]) -> list[str]:
    """["--seed", "7", "--fast"] -> ["seed=7", "fast=True"]"""
    found: list[str] = []
    for word in unknown:
        if word.startswith("--"):
            found.append(word[2:])
        elif found and "=" not in found[-1]:
            found[-1] += f"={word}"
        else:
            parser.refuse(word)
    parts = [word.partition("=") for word in found]
    return [f"{name.replace('-', '_')}={value if equals else True}" for name, equals, value in parts]


def _add_notebooks(commands: Any) -> None:
    p = command(commands, "notebooks", "care for the committed notebooks")
    build = command(p.add_subparsers(metavar="COMMAND", title="commands"), "build",
                     "run notebooks at tier=cpu and rewrite them and their Chinese twins as they may be committed", _build)
    build.add_argument("notebooks", metavar="NOTEBOOK", nargs="*", help="an .ipynb file (default: the whole course)")
    build.add_argument("--no-run", dest="run", action="store_false", help="keep the outputs as they are")
    build.add_argument("--stamp", action="store_true", help="declare the Chinese prose up to date with the English text")


def _build(args: argparse.Namespace) -> None:
    from llmkit.demo import notebooks_folder
    from llmkit.notebook.build import build

    for notebook in args.notebooks or sorted(notebooks_folder().glob("*.ipynb")):
        for path in build(notebook, run=args.run, stamp=args.stamp):
            print(show_path(path), flush=True)
