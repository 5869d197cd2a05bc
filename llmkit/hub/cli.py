"""`llmkit pull | list | rm | verify`: what they print. The arguments are declared in llmkit/cli/models.py."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.errors import LlmkitError
from llmkit.hub.cache import size_text

if TYPE_CHECKING:
    from llmkit.hub.inventory import Model

COLUMNS = ("model", "source", "revision", "size", "weights", "licence", "state")


def pull(args: argparse.Namespace) -> None:
    """Fetch; the folder goes to stdout, what was done to stderr."""
    from llmkit.hub import download_report, resolve

    print(resolve(args.model, source=args.source, revision=args.revision, cache_dir=args.cache_dir,
                  allow_patterns=args.allow_patterns, update=args.update))  # fmt: skip
    print(download_report(), file=sys.stderr)


def list_models(args: argparse.Namespace) -> None:
    """A table, or JSON."""
    from llmkit.hub.inventory import models

    found = models(_folder(args))
    if args.json:
        print(json.dumps([_facts(m) | {"bytes": m.size, "folder": str(m.folder)} for m in found], ensure_ascii=False, indent=1))
        return
    rows = [tuple(_facts(m).values()) for m in found]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows)]
    for row in (COLUMNS, *rows):
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
    print(f"{len(found)} model{'s' * (len(found) != 1)}, {size_text(sum(m.size for m in found))}", file=sys.stderr)


def _facts(model: Model) -> dict[str, str]:
    values = (model.id, model.source, model.revision, size_text(model.size), model.quantisation, model.licence, model.state)
    return dict(zip(COLUMNS, values))


def remove(args: argparse.Namespace) -> None:
    """Delete models; a name that is not there stops before anything is deleted."""
    from llmkit.hub import inventory

    found = [model for name in args.models for model in inventory.find(name, args.source, _folder(args))]
    for home, model in {m.home: m for m in found}.items():
        print(f"removed {model.source}:{model.id}, {size_text(inventory.remove(model))}, {home}")


def verify(args: argparse.Namespace) -> int:
    """Compare every byte with what the hub lists; 1 when something is wrong or could not be compared."""
    from llmkit.hub import inventory

    folder = _folder(args)
    found = [m for n in args.models for m in inventory.find(n, args.source, folder)] if args.models else inventory.models(folder)
    return max([_verify(model) for model in found], default=0)


def _verify(model: Model) -> int:
    from llmkit.hub import inventory

    name = f"{model.source}:{model.id}@{model.revision}"
    try:
        checked = inventory.verify(model)
    except LlmkitError as error:
        print(f"?  {name}: not compared: {error.message}")
        return 1
    if not checked:
        print(f"·  {name}: {model.state}; it came from no hub, so there is no list of hashes to compare with")
        return int(model.state != "whole")
    wrong = [f"   {path}: {problem}" for path, problem in checked if problem]
    mark, right = "✗" if wrong else "✓", len(checked) - len(wrong)
    print(f"{mark}  {name}: {right} of {len(checked)} files are right, {size_text(model.size)}")
    if wrong:
        print("\n".join(wrong) + f"\n   -> llmkit pull {model.source}:{model.id}")
    return int(bool(wrong))


def _folder(args: argparse.Namespace) -> Path | None:
    return Path(args.cache_dir).expanduser() if args.cache_dir else None
