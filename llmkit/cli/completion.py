"""`llmkit completion SHELL`: a script with which the Tab key completes commands, flags and their values."""

from __future__ import annotations

import argparse
from typing import Any

from llmkit.cli.parser import Parser, command, subcommands

SHELLS = ("bash", "zsh", "tcsh")


def add(commands: Any) -> None:
    """Add the command."""
    p = command(commands, "completion", 'print what makes the Tab key complete llmkit: eval "$(llmkit completion bash)"', _print)
    p.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))


def _print(args: argparse.Namespace) -> None:
    import shtab

    from llmkit.cli import build_parser

    parser = build_parser()
    _fill(parser)
    print(shtab.complete(parser, args.shell))


def _fill(parser: Parser) -> None:
    """Have all flags of all commands, which are else added on first use."""
    for each in subcommands(parser).values():
        _fill(each)
