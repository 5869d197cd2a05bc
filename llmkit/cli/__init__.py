"""The command line: one argparse tree, made by `build_parser`, for the shell and for whoever else wants the commands.

Nothing heavy is imported before a command runs. Exit codes: 0 done, 1 an error or a failed check, 2 wrong usage,
130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence

from llmkit import __version__
from llmkit.cli import batch, chat, checks, completion, generate, models, notebooks, serve, servers
from llmkit.cli.notebooks import Screen, result_line, show_path
from llmkit.cli.parser import Parser, UsageError, subcommands
from llmkit.errors import LlmkitError

# a module a family of commands, in the order of `llmkit --help`
FAMILIES = (notebooks, models, generate, chat, serve, batch, servers, checks, completion)
Extend = Callable[[Mapping[str, Parser]], None]
__all__ = ["Parser", "Screen", "UsageError", "build_parser", "main", "parse", "result_line", "show_path", "subcommands"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. Errors are printed to stderr as `error: what` and `-> how to mend it`."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        return args.handler(args) or 0
    except LlmkitError as e:
        print(f"error: {e.message}" + (f"\n  -> {e.hint}" if e.hint else ""), file=sys.stderr)
        return 2 if isinstance(e, UsageError) else 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `llmkit ... | head`: the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141


def parse(argv: Sequence[str], prog: str = "llmkit", extend: Extend | None = None) -> argparse.Namespace:
    """Parse a command line. Raises UsageError, never exits (but for --help and --version)."""
    args, unknown = build_parser(prog, extend).parse_known_args(list(argv))
    if unknown and args.leaf.takes_parameters:
        args.parameters = [*notebooks.loose_parameters(args.leaf, unknown), *(args.parameters or [])]
    elif unknown:
        args.leaf.refuse(unknown[0])
    return args


def build_parser(prog: str = "llmkit", extend: Extend | None = None) -> Parser:
    """The whole tree. Each leaf sets `handler(args) -> exit code`. extend: gets the commands by name, to add what only its caller
    has."""
    parser = Parser(prog=prog, description="Download, run, serve and look inside large language models.")
    parser.add_argument("--version", action="version", version=f"llmkit {__version__}")
    parser.set_defaults(handler=lambda args: parser.print_help())
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for family in FAMILIES:
        family.add(commands)
    if extend:
        extend(commands.choices)
    return parser
