"""Flags made from tables of options: one a field of a dataclass, and vLLM's that llmkit does not have."""

from __future__ import annotations

import argparse
import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from llmkit.cli.parser import UsageError


def spellings(name: str) -> list[str]:
    """--max-model-len and --max_model_len."""
    return list(dict.fromkeys([f"--{name.replace('_', '-')}", f"--{name}"]))


def add_flags(group: Any, table: type, aliases: Mapping[str, str] = {}, skip: tuple[str, ...] = ()) -> None:
    """A flag for each field of the dataclass `table`, and hidden ones for its other spellings. Only those that are given get into
    the namespace."""
    hints = typing.get_type_hints(table)
    for f in dataclasses.fields(table):
        if f.name in skip:
            continue
        others = [other for other, own in aliases.items() if own == f.name]
        names = [f.name, *others] if f.name[:-1] not in others else [f.name[:-1], f.name, *others]  # --api-key for api_keys
        shown, *hidden = dict.fromkeys(word for name in names for word in spellings(name))
        how = _how(hints[f.name], f.metadata["choices"]) | {"dest": f.name, "default": argparse.SUPPRESS}
        if "action" not in how and not how.get("choices"):
            how["metavar"] = names[0].upper()
        group.add_argument(shown, help=f.metadata["help"] + _default(f.default), **how)
        if hidden:
            group.add_argument(*hidden, help=argparse.SUPPRESS, **how)


def _default(value: Any) -> str:
    """What happens without the flag, where the help does not say so anyway."""
    text = " ".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else value
    return "" if text in (None, "", False, True) else f" (default: {text})"


def _how(hint: Any, choices: tuple[str, ...] | None) -> dict[str, Any]:
    kinds = [k for k in (typing.get_args(hint) or (hint,)) if k is not types.NoneType]
    if typing.get_origin(hint) is tuple:
        return {"nargs": "+", "action": Several, "metavar": "WORD"}
    if typing.get_origin(kinds[0]) is dict:
        return {"type": _json}
    if kinds[0] is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": kinds[0], "choices": choices}


def _json(text: str) -> Any:
    """A JSON object."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


_json.__name__ = "JSON object"  # argparse names it when a word is none


class Several(argparse.Action):
    """A flag with one or more words, which may be given again; a JSON list counts as its items."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        words = [w for value in values for w in (json.loads(value) if value.startswith("[") else [value])]
        setattr(namespace, self.dest, (*getattr(namespace, self.dest, ()), *words))


class Foreign(argparse.Action):
    """A flag of vLLM's: harmless where it asks for what happens anyway, else refused with what to do instead."""

    def __init__(self, *args: Any, harmless: tuple[Any, ...], hint: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.harmless, self.hint = harmless, hint

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        flag = option_string or self.option_strings[0]
        value = not flag.startswith("--no-") if self.nargs == 0 else _literal(values)
        if not any(value is h or (value == h and type(value) is type(h)) for h in self.harmless):
            given = "" if self.nargs == 0 else f" {values}"
            raise UsageError(f"{parser.prog} has no option {flag}{given}", self.hint)


def _literal(word: str) -> Any:
    """`word` as a number, true, false, null or JSON if it is one."""
    try:
        return json.loads({"None": "null", "True": "true", "False": "false"}.get(word, word))
    except ValueError:
        return word


def add_foreign_flags(
    parser: argparse.ArgumentParser, table: Mapping[str, tuple[tuple[Any, ...], str]], short: Mapping[str, str] = {}
) -> None:
    """Hidden flags for vLLM's options in `table` that `parser` does not have itself. short: -pp and the like -> the option."""
    known = {name for action in parser._actions for name in action.option_strings}
    for name, (harmless, hint) in table.items():
        switch = any(isinstance(v, bool) for v in harmless)
        names = spellings(name) + ([f"--no-{name.replace('_', '-')}"] if switch else [])
        names = [n for n in names if n not in known] + [letters for letters, own in short.items() if own == name]
        if names:
            parser.add_argument(*names, action=Foreign, nargs=0 if switch else None, harmless=harmless, hint=hint,
                                default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # fmt: skip


def given(args: argparse.Namespace, table: type) -> dict[str, Any]:
    """The fields of `table` that a command line named."""
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(table) if hasattr(args, f.name)}
