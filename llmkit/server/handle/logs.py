"""What a server printed: the end of its log, or the log as it grows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmkit.server.handle.server import Server

_LOOK = 0.2  # seconds between two looks at a log that is followed


class Lines(str):
    """Lines of a log; a notebook shows them as they are."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return f'<pre aria-label="server log" style="max-height:30em;overflow:auto">{escape(self)}</pre>'


def tail(path: Path | None, lines: int) -> Lines:
    """The last lines of a file that may be long; nothing where there is none."""
    if path is None or not path.exists() or lines < 1:
        return Lines()
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 400 * lines - 1000))
        return Lines("\n".join(file.read().decode("utf-8", "replace").splitlines()[-lines:]))


def follow(server: Server, lines: int) -> Iterator[str]:
    """The last lines, and then what is added, until the server has ended."""
    path = server.record.log
    if path is None or not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        if text := tail(path, lines):
            yield f"{text}\n"
        file.seek(0, 2)
        while True:
            alive = server.record.alive  # asked first: what it says with its last breath is read below
            if text := file.read():
                yield text
            elif not alive:
                return
            else:
                time.sleep(_LOOK)
