"""Calls written as Python: `[get_weather(city="Paris", days=3), ...]`, each told when its bracket closes."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Collection

from llmkit.server.message import Arguments, CallIds
from llmkit.server.tools.json_reader import Reader, Status

_CLOSING = {"(": ")", "[": "]", "{": "}"}
_MAX_CALL = 1_000_000  # characters


class PythonicReader(Reader):
    """Finds where each call ends by its brackets and quotes, then has Python's own parser read it."""

    def __init__(self, ids: CallIds, names: Collection[str]) -> None:
        super().__init__()
        self._ids, self._names = ids, names
        self._phase = "open"  # then: call, next
        self._source: list[str] = []
        self._brackets: list[str] = []
        self._quote, self._escaped = "", False

    def _push(self, c: str) -> Status:
        if self._phase == "call" and self._source:
            return self._in_call(c)
        if c.isspace():
            return Status.MORE
        if self._phase == "open" and c == "[":
            self._phase = "call"
        elif self._phase == "call" and (c.isalpha() or c == "_"):
            return self._in_call(c)
        elif self._phase == "next" and c == ",":
            self._phase = "call"
        elif self._phase == "next" and c == "]":
            return Status.END
        else:
            return Status.BROKEN
        return Status.MORE

    def _in_call(self, c: str) -> Status:
        self._source.append(c)
        if self._quote:
            self._in_string(c)
        elif c in "\"'":
            self._quote = c
        elif c in _CLOSING:
            self._brackets.append(_CLOSING[c])
        elif c in ")]}":
            if not self._brackets or self._brackets.pop() != c:
                return Status.BROKEN
            return Status.MORE if self._brackets else self._call_ends()
        elif not self._brackets and not (c.isalnum() or c in "_.- "):
            return Status.BROKEN
        return Status.MORE if len(self._source) < _MAX_CALL else Status.BROKEN

    def _in_string(self, c: str) -> None:
        if self._escaped:
            self._escaped = False
        elif c == "\\":
            self._escaped = True
        elif c == self._quote:
            self._quote = ""

    def _call_ends(self) -> Status:
        called = read_call("".join(self._source))
        if called is None or called[0] not in self._names:
            return Status.BROKEN
        self.told, self._source, self._phase = True, [], "next"
        call = self._ids.new(called[0])
        self.events += [call, Arguments(call.index, called[1])]
        return Status.MORE


def read_call(source: str) -> tuple[str, str] | None:
    """(name, arguments as JSON) of one call with literal arguments, or None when it is nothing of the kind."""
    name, _, inside = source.partition("(")
    try:
        # the name is set aside: tools may be called what Python does not allow
        with warnings.catch_warnings(action="ignore"):  # "\\d" in a string is worth a warning to Python, and none to us
            tree = ast.parse(f"f({inside}", mode="eval").body
        if not isinstance(tree, ast.Call) or tree.args or any(k.arg is None for k in tree.keywords):
            return None
        values = {str(k.arg): _literal(k.value) for k in tree.keywords}
        return name.strip(), json.dumps(values, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):  # all that Python says of text that is no call
        return None


def _literal(node: ast.expr) -> object:
    """The node's value; true, false and null count, since models mix the two languages."""
    words = {"true": True, "false": False, "null": None}
    if isinstance(node, ast.Name) and node.id in words:
        return words[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(n) for n in node.elts]
    if isinstance(node, ast.Dict) and all(isinstance(k, ast.Constant) for k in node.keys):
        return {str(ast.literal_eval(k)): _literal(v) for k, v in zip(node.keys, node.values) if k is not None}
    return ast.literal_eval(node)
