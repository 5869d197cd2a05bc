"""Python's garbage collector in processes that answer."""

from __future__ import annotations

import gc


def spare_what_is_there() -> None:
    """Full passes of the collector skip, from now on, what a process holds when it is ready and will hold until it ends.

    torch and the libraries around it are 200,000 objects, and a pass over them stops every stream for a tenth of a second.
    """
    gc.collect()
    gc.freeze()
