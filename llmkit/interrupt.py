"""Interrupts between steps, never inside one: Ctrl-C and Jupyter's stop button leave the engine consistent."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupt_afterwards() -> Iterator[None]:
    """Run the block to its end even if SIGINT arrives, then raise KeyboardInterrupt. A second SIGINT interrupts at once.

    Outside the main thread, where Python delivers no signals, and where the user's program ignores SIGINT, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
        yield
        return
    arrived = False

    def remember(signum: int, frame: FrameType | None) -> None:
        nonlocal arrived
        if arrived:
            raise KeyboardInterrupt
        arrived = True

    previous = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if arrived:
        raise KeyboardInterrupt
