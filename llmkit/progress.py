"""Progress of a generation: requests done and tokens a second, in a terminal, a notebook, or not at all."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

_INTERVAL = 0.2  # seconds between two drawings


class GenerationBar(Protocol):
    """What `LLM.generate` tells."""

    def due(self) -> bool:
        """True when it is time to show something new."""
        ...

    def show(self, done: int, tokens_per_second: float) -> None:
        """So many requests have ended; the speed so far."""
        ...


class _Silent:
    def due(self) -> bool:
        return False

    def show(self, done: int, tokens_per_second: float) -> None:
        """Nobody looks."""


class _Timed:
    """Draws now and then, so that the drawing costs nothing."""

    def __init__(self) -> None:
        self._next = 0.0

    def due(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + _INTERVAL
        return True


class _Terminal(_Timed):
    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        super().__init__()
        self.bar = tqdm(total=total, desc="generate", unit="req", file=sys.stderr, dynamic_ncols=True)

    def show(self, done: int, tokens_per_second: float) -> None:
        self.bar.set_postfix_str(f"{tokens_per_second:.0f} tok/s", refresh=False)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        self.bar.close()


class _Notebook(_Timed):
    """One display that is updated, and so saved in its final state."""

    def __init__(self, total: int) -> None:
        from IPython.display import display

        super().__init__()
        self.total, self.done, self.speed = total, 0, 0.0
        self.handle: Any = display(self._state(), raw=True, display_id=True)

    def _state(self) -> dict[str, str]:
        text = f"{self.done}/{self.total} requests, {self.speed:.0f} tok/s"
        html = f'<progress value="{self.done}" max="{self.total}" aria-label="requests done"></progress> {text}'
        return {"text/plain": text, "text/html": html}

    def show(self, done: int, tokens_per_second: float) -> None:
        self.done, self.speed = done, tokens_per_second
        self.handle.update(self._state(), raw=True)

    def close(self) -> None:
        self.handle.update(self._state(), raw=True)


def in_notebook() -> bool:
    """True in a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


@contextmanager
def generation_progress(total: int, show: bool) -> Iterator[GenerationBar]:
    """A bar over `total` requests; none for a single one, which is over before a bar is read, nor in a log file."""
    if not show or total < 2 or not (in_notebook() or sys.stderr.isatty()):
        yield _Silent()
        return
    bar = _Notebook(total) if in_notebook() else _Terminal(total)
    try:
        yield bar
    finally:
        bar.close()
