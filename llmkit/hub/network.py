"""Is anybody there, and going on after an interruption."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from llmkit.hub.faults import Interrupted

T = TypeVar("T")
PATIENCE = 2.0  # seconds until a hub counts as unreachable
HEAD_START = 0.5  # seconds before the next hub is tried beside the first
LONGEST_WAIT = 60.0


class Probe:
    """Opens (and closes) a connection to each endpoint, in threads: looking up a name cannot be bounded otherwise."""

    def __init__(self, endpoints: dict[str, str]) -> None:
        self._endpoints, self._reasons = endpoints, dict.fromkeys(endpoints, "no answer")
        self._threads: dict[str, tuple[threading.Thread, float]] = {}

    def reason(self, name: str) -> str | None:
        """Why `name` cannot be reached; None when it can. While the first is silent, the others are tried beside it, so that
        all together take no longer than PATIENCE."""
        self._begin(name, time.monotonic() + PATIENCE)
        thread, end = self._threads[name]
        thread.join(max(0.0, min(HEAD_START, end - time.monotonic())))
        if thread.is_alive():
            for other in self._endpoints:
                self._begin(other, end)
            thread.join(max(0.0, end - time.monotonic()))
        return self._reasons[name] or None

    def _begin(self, name: str, end: float) -> None:
        if name not in self._threads:
            self._threads[name] = threading.Thread(target=self._connect, args=(name,), daemon=True), end
            self._threads[name][0].start()

    def _connect(self, name: str) -> None:
        try:
            socket.create_connection(address(self._endpoints[name]), PATIENCE).close()
            self._reasons[name] = ""
        except OSError as error:
            self._reasons[name] = error.strerror or str(error)


def address(endpoint: str) -> tuple[str, int]:
    """Host and port that a request to `endpoint` goes to: its proxy's, where one is configured."""
    url = urlsplit(endpoint)
    proxies = getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(url.netloc):
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return url.hostname or "", url.port or (443 if url.scheme == "https" else 80)


def persist(attempt: Callable[[], T], fetched: Callable[[], int], tries: int = 3, note: Callable[[str], None] | None = None) -> T:
    """Run `attempt` until it ends well. It may fail `tries` times in a row without `fetched()` growing; then its error is raised,
    with the bytes that came in `error.fetched`."""
    failures, before, start = 0, fetched(), fetched()
    while True:
        try:
            return attempt()
        except Interrupted as error:
            now = fetched()
            failures, before = (0 if now > before else failures + 1), max(now, before)
            error.fetched = max(error.fetched, before - start)
            if failures >= tries:
                raise
            seconds = min(LONGEST_WAIT, error.retry_after if error.retry_after is not None else 2.0**failures - 1)
            if note:
                note(f"interrupted, going on in {seconds:.0f} s" if seconds >= 1 else "interrupted, going on")
            time.sleep(seconds)
