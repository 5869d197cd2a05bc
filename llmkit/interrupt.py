"""Interrupts between steps, never inside one: Ctrl-C and Jupyter's stop button leave the engine consistent."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class _Remember:
    """A signal handler that notes the first SIGINT, and tells of it, and lets a second one through at once."""

    def __init__(self, tell: Callable[[], object] | None) -> None:
        self.arrived, self.tell = False, tell

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.arrived:
            raise KeyboardInterrupt
        self.arrived = True
        if self.tell:
            self.tell()


@contextmanager
def interrupt_afterwards(tell: Callable[[], object] | None = None) -> Iterator[None]:
    """Run the block to its end even if SIGINT arrives, then raise KeyboardInterrupt. A second SIGINT interrupts at once.
    tell: called when it arrives, so that the block may end sooner.

    Nested, the outermost block decides. Outside the main thread, where Python delivers no signals, and where the user's program
    ignores SIGINT, this does nothing. 10 us.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGINT)
    if previous in (signal.SIG_IGN, None) or isinstance(previous, _Remember):
        yield
        return
    remember = _Remember(tell)
    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if remember.arrived:
        raise KeyboardInterrupt
