"""`%load_ext llmkit`: the command line in a cell, `%llmkit pull`, `%llmkit doctor`, `%llmkit --help`.

The words are the command line's own (`llmkit.cli.build_parser`): one tree, one help, one "did you mean". A command that has
something better than printed text to show is in LINES: its function takes the parsed arguments and returns an object that draws
itself, in HTML and in text, and can be kept: `report = %llmkit doctor`. Any other command runs as it does in the terminal.
Commands that read the body of the cell (`%%llmkit NAME`) are in CELLS.
"""

from __future__ import annotations

import argparse
import html
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit import cli
from llmkit.hub.cache import size_text
from llmkit.notebook import server_magics

if TYPE_CHECKING:
    from llmkit.doctor import Report
    from llmkit.hub.inventory import Model
    from llmkit.hub.report import DownloadReport

PROG = "%llmkit"


def load(shell: Any) -> None:
    """Give the magic, and its tab completion, to an IPython shell."""
    shell.register_magic_function(llmkit, "line_cell", "llmkit")
    for prefix in ("%llmkit", "%%llmkit"):
        shell.set_hook("complete_command", lambda _, event: complete(event.line), str_key=prefix)


def llmkit(line: str, cell: str | None = None) -> Any:
    """Download, run, serve and look inside large language models. `%llmkit --help` lists the commands."""
    words = _words(line)
    try:
        args = cli.parse(words, PROG, server_magics.extend)
    except SystemExit:  # argparse has shown the help or the version
        return None
    args.words = words
    command = args.leaf.prog.removeprefix(PROG).strip()
    if cell is not None:
        if command not in CELLS:
            raise cli.UsageError(f"%{PROG} {command} takes no cell below it", f"one percent sign: {PROG} {line}".rstrip())
        return CELLS[command](args, cell)
    shown = LINES.get(command, _as_in_the_terminal)
    return shown(args)


def _words(line: str) -> list[str]:
    """The line as a shell would split it; `help WORDS` stands for `WORDS --help`."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        hint = "close the quotation mark, or write \\' for an apostrophe"
        raise cli.UsageError(f"{PROG} {line}: {str(error).lower()}", hint) from error
    return [*words[1:], "--help"] if words[:1] == ["help"] else words or ["--help"]


# ---- what commands show in a cell


def _as_in_the_terminal(args: argparse.Namespace) -> None:
    code = args.handler(args)
    if code:  # what was wrong is printed above; a run without a browser must fail
        raise cli.LlmkitError(f"{args.leaf.prog} ended with exit code {code}")


def _doctor(args: argparse.Namespace) -> Report | dict[str, Any]:
    from llmkit.doctor import diagnose

    report = diagnose()
    return report.to_dict() if args.json else report


def _pull(args: argparse.Namespace) -> Pulled:
    from llmkit.hub import download_report, resolve

    resolve(args.model, source=args.source, revision=args.revision, cache_dir=args.cache_dir,
            allow_patterns=args.allow_patterns, update=args.update)  # fmt: skip
    report = download_report()
    assert report is not None, "resolve has just made one"
    return Pulled(report)


def _list(args: argparse.Namespace) -> Models:
    from llmkit.hub.inventory import models

    return Models(models(Path(args.cache_dir).expanduser() if args.cache_dir else None))


class Pulled:
    """A model's folder, and how it got there. A path for `LLM(...)` and `open`: `folder = %llmkit pull ID`."""

    def __init__(self, report: DownloadReport) -> None:
        self.report, self.folder = report, report.folder

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        return str(self.report)

    def _repr_html_(self) -> str:
        from llmkit.doctor.software import short

        fetched = "already here" if not self.report.files else f"{size_text(self.report.bytes)} fetched"
        place = f"{self.report.source}, {fetched}, {self.report.seconds:.1f} s"
        return f"<b>{html.escape(self.report.id)}</b> ({html.escape(place)})<br><code>{html.escape(short(self.folder))}</code>"


class Models(list["Model"]):
    """The models on this machine, and a table of what they were when it was asked."""

    COLUMNS = ("model", "source", "revision", "size", "weights", "licence", "state")

    def __init__(self, models: list[Model]) -> None:
        super().__init__(models)
        self.rows = [(m.id, m.source, m.revision, size_text(m.size), m.quantisation, m.licence, m.state) for m in models]

    def __repr__(self) -> str:
        rows = [self.COLUMNS, *self.rows]
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows)

    def _repr_html_(self) -> str:
        head = "".join(f'<th scope="col" style="text-align:left">{c}</th>' for c in self.COLUMNS)
        cells = ["".join(f'<td style="text-align:left">{html.escape(text)}</td>' for text in row) for row in self.rows]
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


LINES: dict[str, Callable[[argparse.Namespace], Any]] = {"doctor": _doctor, "pull": _pull, "list": _list} | server_magics.LINES
CELLS: dict[str, Callable[[argparse.Namespace, str], Any]] = server_magics.CELLS


# ---- tab completion


def complete(line: str) -> list[str]:
    """What may stand where the line `%llmkit ...` ends: commands, options, or the values of the option before."""
    _, *words = line.lstrip("%").split(" ")
    *before, word = words or [""]
    parser, last = cli.build_parser(PROG, server_magics.extend), ""
    for last in filter(None, before):
        parser = cli.subcommands(parser).get(last, parser)
    return sorted(c for c in _candidates(parser, last, word.startswith("-")) if c.startswith(word))


def _candidates(parser: cli.Parser, last: str, option: bool) -> list[str]:
    commands = list(cli.subcommands(parser))
    actions = {name: action for action in parser._actions for name in action.option_strings}
    if last in actions and actions[last].choices:
        return [str(choice) for choice in actions[last].choices or ()]
    return [name for name in actions if name.startswith("--")] if option or not commands else [*commands, "help"]
