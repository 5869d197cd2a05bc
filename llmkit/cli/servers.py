"""`llmkit status | logs | stop`: the servers on this machine, whoever started them."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from llmkit.cli.parser import command

WHICH = "its pid, port, or model (default: the newest; in a notebook, that notebook's)"


def add(commands: Any) -> None:
    """status, logs, stop."""
    status = command(commands, "status", "show the servers that run on this machine", _status)
    status.add_argument("--all", action="store_true", help="also those that are gone, whose logs are still here")
    status.add_argument("--json", action="store_true", help="as JSON")
    logs = command(commands, "logs", "show what a server printed", _logs)
    logs.add_argument("server", metavar="SERVER", nargs="?", help=WHICH)
    logs.add_argument("-n", "--lines", metavar="N", type=int, default=50, help="the last N lines (default: 50)")
    logs.add_argument("-f", "--follow", action="store_true", help="go on with what it prints, until interrupted")
    stop = command(commands, "stop", "stop a server, and whatever it started", _stop)
    stop.add_argument("server", metavar="SERVER", nargs="?", help=f"{WHICH}; or all")


def _status(args: argparse.Namespace) -> None:
    from llmkit.server.handle.list_view import servers, status_json

    found = servers(gone=args.all)
    print(json.dumps(status_json(found), ensure_ascii=False, indent=1) if args.json else found)


def _logs(args: argparse.Namespace) -> None:
    from llmkit.server.handle.logs import follow, tail
    from llmkit.server.handle.server import find

    server = find(args.server, gone=True)
    if not args.follow:
        print(tail(server.record.log, args.lines))
        return
    for text in follow(server, args.lines):
        print(text, end="", flush=True)


def _stop(args: argparse.Namespace) -> None:
    from llmkit.server.handle.server import stop_servers

    for server in stop_servers(args.server):
        record = server.record
        print(f"stopped {record.name} (pid {record.pid}), which ran for {time.time() - record.started:.0f} s")
