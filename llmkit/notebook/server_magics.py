"""`%llmkit serve | status | logs | stop`, and the flags that only a notebook has."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from llmkit.cli.parser import Parser, UsageError

if TYPE_CHECKING:
    from llmkit.server.handle.list_view import Servers
    from llmkit.server.handle.logs import Lines
    from llmkit.server.handle.server import Server


WHOM = ("a variable that holds a server or an LLM, a URL, or a running server's model, port or pid (default: whom you talked to, "
        "else the newest server, else an LLM)")  # fmt: skip


def serve_flags(parser: Parser) -> None:
    """Those of `%llmkit serve`."""
    group = parser.add_argument_group("in a notebook")
    group.add_argument("--wait", action=argparse.BooleanOptionalAction, default=None,
                       help="return when the server is ready (default: at once; in a run without a browser, when it is ready)")
    group.add_argument("--timeout", metavar="SECONDS", type=float, default=600.0, help="how long to wait at most (default: 600)")
    group.add_argument("--new", action="store_true", help="another server, though one with the same arguments runs")


def chat_flags(parser: Parser) -> None:
    """Those of `%%llmkit chat`; the rest of its flags are the terminal's."""
    group = parser.add_argument_group("in a notebook")
    group.add_argument("--model", metavar="WHOM", dest="whom", help=WHOM)
    group.add_argument("--out", metavar="VAR", help="keep the answer in this variable: text, usage, ttft, tokens_per_second")
    group.add_argument("--new", action="store_true", help="begin another conversation")


def extend(commands: Mapping[str, Parser]) -> None:
    """Give the command line's tree what only the magics have."""
    for name, flags in (("serve", serve_flags), ("chat", chat_flags)):
        if name in commands:
            flags(commands[name])


def serve(args: argparse.Namespace) -> Server:
    """Start a server, or find the living one; a card that follows its start."""
    from llmkit.notebook.live_card import headless, show
    from llmkit.server.handle.start import start

    own = Parser(add_help=False)
    serve_flags(own)
    server = start(own.parse_known_args(args.words)[1], reuse=not args.new)
    show(server)
    return server.wait_in_sight(args.timeout) if args.wait or (args.wait is None and headless()) else server


def status(args: argparse.Namespace) -> Servers | list[dict[str, Any]]:
    from llmkit.server.handle.list_view import servers, status_json

    found = servers(gone=args.all)
    return status_json(found) if args.json else found


def logs(args: argparse.Namespace) -> Lines | None:
    from llmkit.server.handle.server import find

    if not args.follow:
        return find(args.server, gone=True).logs(args.lines)
    try:
        args.handler(args)
    except KeyboardInterrupt:
        print("\n(the server goes on)")  # the stop button is how following ends: no error


def stop(args: argparse.Namespace) -> Servers:
    """Stop, and show what was stopped."""
    from llmkit.server.handle.list_view import Servers
    from llmkit.server.handle.server import stop_servers

    return Servers(stop_servers(args.server))


def chat(args: argparse.Namespace, cell: str) -> None:
    """Say the cell to a model; the answer streams into one display."""
    from llmkit.cli.batch import server_key
    from llmkit.cli.generate import sampling_options
    from llmkit.config import engine_options
    from llmkit.notebook.chat_magic import say

    sampling, engine = sampling_options(args), engine_options(args)
    if sampling.get("n", 1) != 1:
        raise UsageError(f"%%llmkit chat shows one answer at a time, not {sampling['n']}", "drop --n")
    whom = args.whom or args.url or engine.pop("model", None)
    sampling |= {"seed": engine.pop("seed")} if "seed" in engine else {}
    if engine:
        raise UsageError(f"%%llmkit chat loads no model; {next(iter(engine))} means nothing to it", "give it to %llmkit serve")
    say(cell, whom, api_key=server_key(args), system=args.system, load=args.load, out=args.out, new=args.new, sampling=sampling)


LINES: dict[str, Callable[[argparse.Namespace], Any]] = {"serve": serve, "status": status, "logs": logs, "stop": stop}
CELLS: dict[str, Callable[[argparse.Namespace, str], None]] = {"chat": chat}
