"""`{expr}` in the text of a cell: values of the notebook, put into a prompt. Other braces stay what they are."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Mapping
from typing import Any

from llmkit.errors import LlmkitError, did_you_mean

_BUILTINS = set(dir(builtins))  # `/users/{id}` does not mean Python's function
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


class InterpolationError(LlmkitError, ValueError):
    """An expression in a prompt that could not be computed."""


def interpolate(text: str, names: Mapping[str, Any]) -> tuple[str, list[str]]:
    """(text with each `{expr}` computed, notes about those left alone).

    An expression is what Python reads as one and what uses a name, so JSON, LaTeX and C stay as they are: `{"a": 1}`, `x^{2}`.
    One with an unknown name is left alone too, and noted. `{{` and `}}` are single braces. An expression that fails raises.
    """
    notes: list[str] = []

    def value(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        used = [n for n in _names(match[1]) if n in names or n not in _BUILTINS]
        if not used:
            return match[0]
        if unknown := [n for n in used if n not in names]:
            near = did_you_mean(unknown[0], [n for n in names if not n.startswith("_")])
            meant = f"; did you mean {near!r}?" if near else ""
            notes.append(f"{match[0]} stayed as it is: there is no {unknown[0]!r}{meant}")
            return match[0]
        return _compute(match[1], names)

    return _BRACES.sub(value, text), notes


def _names(code: str) -> list[str]:
    """The free names of an expression; none when it is not one."""
    try:
        tree = ast.parse(code.strip(), mode="eval")
    except (SyntaxError, ValueError):
        return []
    own = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id not in own]


def _compute(code: str, names: Mapping[str, Any]) -> str:
    try:
        return str(eval(code.strip(), dict(names)))
    except Exception as e:
        raise InterpolationError(f"{{{code}}} in the prompt: {type(e).__name__}: {e}", "write {{ and }} for plain braces") from e
