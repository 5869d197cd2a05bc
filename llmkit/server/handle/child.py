"""A server's process, as the process that started it holds it.

Who outlives whom: the server runs in a session of its own, so the stop button, which interrupts the kernel's process group, does
not reach it; it watches its stdin, a pipe whose other end only this process holds, so it ends with this process, however that
ends.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


class Child:
    """A server that this process started. pipe: our end of its stdin, which it lives on; no other process may hold it."""

    def __init__(self, argv: list[str], log: Path) -> None:
        theirs, self.pipe = os.pipe()
        try:
            with log.open("wb") as output:
                self.process = subprocess.Popen(argv, stdin=theirs, stdout=output, stderr=subprocess.STDOUT,
                                                start_new_session=True, env=_environment())  # fmt: skip
        finally:
            os.close(theirs)

    def let_go(self) -> None:
        """Close the pipe: the server ends."""
        pipe, self.pipe = self.pipe, -1
        if pipe >= 0:
            os.close(pipe)


def _environment() -> dict[str, str]:
    """The server imports the very llmkit that runs here."""
    from llmkit.notebook.run import checkout_roots

    path = os.pathsep.join([*checkout_roots(), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONUNBUFFERED": "1"} | ({"PYTHONPATH": path} if path else {})


OURS: dict[Path, Child] = {}  # by the server's folder


def _forget() -> None:
    """A forked child must neither hold a server's pipe open after its parent's death, nor stop the server when it ends itself."""
    for child in OURS.values():
        child.let_go()
    OURS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
