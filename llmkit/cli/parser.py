"""argparse as llmkit wants it: it raises, names the nearest, and fills itself when first needed."""

from __future__ import annotations

import argparse
import re
import typing
from collections.abc import Callable
from typing import Any

from llmkit.errors import ConfigError, did_you_mean


class UsageError(ConfigError):
    """A command line that cannot be understood; the nearest command or flag is named."""


class Parser(argparse.ArgumentParser):
    """argparse that raises instead of exiting, names the nearest command or flag, and fills itself when first needed.

    fill: adds the arguments on first use, so that `--help` does not import what no one asked for. takes_parameters: unknown flags
    are parameters of a notebook, not mistakes.
    """

    def __init__(self, *args: Any, fill: Callable[[Parser], None] | None = None, takes_parameters: bool = False,
                 **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.fill, self.takes_parameters = fill, takes_parameters

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.complete_arguments()
        space, unknown = super().parse_known_args(args, namespace)
        if not hasattr(space, "leaf"):  # the innermost command gets here first
            space.leaf = self
        return space, unknown

    def complete_arguments(self) -> None:
        """Have all arguments: those that are added on first use too."""
        if self.fill:
            fill, self.fill = self.fill, None
            fill(self)

    def error(self, message: str) -> typing.NoReturn:
        wrong = re.search(r"argument (\S+): invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if not wrong:
            raise UsageError(f"{self.prog}: {message}", f"{self.prog} --help")
        where, name, choices = wrong[1], wrong[2], re.findall(r"[\w.-]+", wrong[3])
        what = f"has no command {name!r}" if where == "COMMAND" else f"{where} cannot be {name!r}"
        self._suggest(what, name, choices)

    def refuse(self, name: str) -> typing.NoReturn:
        """Raise for an argument that no one knows."""
        if not name.startswith("-"):
            raise UsageError(f"{self.prog} takes no further argument {name!r}", f"{self.prog} --help")
        flag = name.partition("=")[0]
        self._suggest(f"has no option {flag}", flag, [o for a in self._actions for o in a.option_strings])

    def _suggest(self, what: str, name: str, known: list[str]) -> typing.NoReturn:
        near = did_you_mean(name, known)
        raise UsageError(f"{self.prog} {what}", f"did you mean {near}?" if near else f"{self.prog} --help")


def subcommands(parser: Parser) -> dict[str, Parser]:
    """The commands below `parser`, by name."""
    parser.complete_arguments()
    trees = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(trees[0]) if trees else {}


Handler = Callable[[argparse.Namespace], int | None]


def command(commands: Any, name: str, help: str, handler: Handler | None = None, **options: Any) -> Parser:
    """A new command; without a handler it shows its help."""
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", **options)
    parser.set_defaults(handler=handler or (lambda args: parser.print_help()))
    return parser
