"""`llmkit bench | doctor`: how fast, and what is wrong."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from llmkit.cli.parser import Parser, command


def add(commands: Any) -> None:
    """bench, doctor."""
    _add_bench(commands)
    _add_doctor(commands)


def _add_bench(commands: Any) -> None:
    def fill(parser: Parser) -> None:
        from llmkit.bench.cli import add_arguments

        add_arguments(parser)

    command(commands, "bench", "measure throughput, latency, startup, or a server under load", _bench, fill=fill)


def _bench(args: argparse.Namespace) -> int | None:
    from llmkit.bench.cli import run

    return run(args)


def _add_doctor(commands: Any) -> None:
    p = command(commands, "doctor", "check this machine: OK, WARN or FAIL, and the command that mends it", _doctor)
    p.add_argument("--json", action="store_true", help="as JSON")


def _doctor(args: argparse.Namespace) -> int:
    from llmkit.doctor import diagnose

    report = diagnose()
    print(report.to_json() if args.json else report.text(colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    return 0 if report.ok else 1
