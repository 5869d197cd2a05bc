"""Python's garbage collector, kept away from what is there to stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def nothing_is_garbage() -> Iterator[None]:
    """The collector waits until the block is over, and takes what it finds then for old.

    For imports: torch and the libraries around it are 170,000 objects, none of them garbage, and looking at them again and again
    while they are made takes a tenth of the time to the first token.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # else somebody has frozen objects that are to stay so
            gc.freeze()  # and back: among the oldest, of which nobody is looked at
            gc.unfreeze()
        gc.enable()


def spare_what_is_there() -> None:
    """Full passes of the collector skip, from now on, what a process holds when it is ready and will hold until it ends.

    A pass over torch and the libraries around it stops every stream for a tenth of a second.
    """
    gc.collect()
    gc.freeze()
