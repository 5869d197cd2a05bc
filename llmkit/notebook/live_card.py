"""A card that follows what it shows: one display, redrawn from a thread, so that the cell that shows it ends at once."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from llmkit.errors import LlmkitError
from llmkit.progress import in_notebook
from llmkit.server.handle.server import START_TIMEOUT, Server

_REDRAW = 0.5  # seconds, while only the clock moves


def show(server: Server) -> None:
    """Display `server`, and follow its start in the background. In plain IPython: print it."""
    if not in_notebook():
        print(repr(server))
        return
    if server.shown_in == (cell := _shell().execution_count):
        return  # a cell's own value is not shown twice
    from IPython.display import display

    server.shown_in = cell
    handle: Any = display(faces(server), raw=True, display_id=True)
    server.cards.append(lambda: handle.update(faces(server), raw=True))
    if server.state in ("starting", "stopping"):
        threading.Thread(target=_follow, args=(server,), name="llmkit-card", daemon=True).start()


def faces(server: Server) -> dict[str, str]:
    """The MIME bundle of a card."""
    return {"text/plain": repr(server), "text/html": server._repr_html_()}


def headless() -> bool:
    """True where nobody can press a button: papermill, nbclient and nbconvert run cells without stdin, frontends with it."""
    shell = _shell()
    return not (hasattr(shell, "kernel") and shell.get_parent().get("content", {}).get("allow_stdin", False))


def _shell() -> Any:
    from IPython.core.getipython import get_ipython

    return get_ipython()


def _follow(server: Server) -> None:
    """Redraw until the start has ended, one way or the other."""
    with contextlib.suppress(LlmkitError):  # its folder was removed meanwhile: the card stays as it is
        for _ in server.changes(START_TIMEOUT, _REDRAW):
            server.refresh()
