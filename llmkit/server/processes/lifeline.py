"""A process that ends when its stdin does: the other end of the pipe is held by one who must not be outlived.

However the holder dies, SIGKILL too, the kernel closes the pipe. (PDEATHSIG would be tied to the thread that forked.)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable


def when_stdin_closes(act: Callable[[], object]) -> None:
    """Call `act` in a thread of its own once stdin has reached its end."""

    def watch() -> None:
        while os.read(0, 4096):
            """Nothing is said on this pipe; only its end counts."""
        act()

    threading.Thread(target=watch, name="llmkit-lifeline", daemon=True).start()
