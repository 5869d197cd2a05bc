"""`--rows`: which rows of a table are wanted."""

from __future__ import annotations

from collections.abc import Iterable

from llmkit.errors import ConfigError


def pick_rows(names: str | None, known: Iterable[str]) -> list[str]:
    """Rows by name, or by the beginning of names ("A-decode" is all its batch sizes), commas between; None is all."""
    known, wanted = list(known), [n.strip() for n in (names or "").split(",") if n.strip()]
    for name in wanted:
        if not any(_matches(row, name) for row in known):
            raise ConfigError(f"--rows {name}: there is no such row", f"there are {', '.join(known)}")
    return [row for row in known if not wanted or any(_matches(row, w) for w in wanted)]


def _matches(row: str, wanted: str) -> bool:
    return row == wanted or row.startswith(f"{wanted}-")
