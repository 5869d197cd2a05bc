"""What is asked of a server, in words: those behind `llmkit`, as in a shell."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmkit.errors import reject_unknown

if TYPE_CHECKING:
    from llmkit.server.processes.serve_options import Plan


def command_words(model: str | os.PathLike[str], options: dict[str, Any]) -> list[str]:
    """The words behind `llmkit` that say the same as these keyword arguments. Raises UnknownOptionError."""
    from llmkit.cli import build_parser, subcommands

    parser = subcommands(build_parser())["serve"]
    parser.complete_arguments()
    flags = {name: action for action in parser._actions for name in action.option_strings if name.startswith("--")}
    known = {name[2:].replace("-", "_") for name in flags} - {"help", "run_file", "watch_stdin"}
    reject_unknown(options, known, "llmkit.serve()")
    spelled = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    return ["serve", os.fspath(model), *(word for flag, value in spelled.items() for word in _flag(flag, value, flags))]


def _flag(flag: str, value: Any, flags: dict[str, Any]) -> list[str]:
    if value is None:
        return []
    action = flags.get(flag) or flags[flag.replace("-", "_").replace("__", "--", 1)]
    if action.nargs == 0:  # a switch
        off = "--no-" + flag[2:]
        return [flag] if value else [off] if off in flags else []
    if isinstance(value, (list, tuple)):
        several = [str(v) for v in value]
        return [flag, *several] if action.nargs in ("+", "*") else [f"{flag}={v}" for v in several]
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    return [flag, text] if action.nargs in ("+", "*") else [f"{flag}={text}"]


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """What `llmkit WORDS` would be told. UsageError for a wrong word."""
    from llmkit.cli import parse

    return parse(words)


def plan_of_words(words: Sequence[str]) -> Plan:
    """What the words mean; mistakes in them come to light here, before anything is started."""
    from llmkit.cli.serve import plan_of

    return plan_of(parsed(words))
