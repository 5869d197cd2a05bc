"""`Server`: one on this machine, held from a notebook, a script or a prompt; whoever started it.

Its folder (`records`) lets any process find it. It ends with the process that started it (`child`), however that ends; `atexit`
is for the tidy path.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit import errors
from llmkit.errors import EngineUnavailableError, LlmkitError
from llmkit.progress import in_notebook
from llmkit.server.handle import records
from llmkit.server.handle.child import OURS
from llmkit.server.handle.logs import Lines, tail
from llmkit.server.handle.records import Record
from llmkit.server.handle.words import plan_of_words

if TYPE_CHECKING:
    import openai

START_TIMEOUT = 600.0  # seconds; a model may have to be fetched first
_LOOK = 0.05  # seconds between two looks at the record
_CARDS: dict[Path, list[Callable[[], None]]] = {}


class ServerDiedError(LlmkitError, RuntimeError):
    """A server's process ended without saying why; the message ends with the last lines of its log."""


class ServerTimeoutError(LlmkitError, TimeoutError):
    """A server was not ready in time. It goes on starting."""


class Server:
    """A server on this machine. Prints as a card; in a notebook the card follows the server's start.

    `with llmkit.serve() as server:` stops it at the end, if this process started it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shown_in: int | None = None  # number of the cell that shows it last

    # ---- what it is

    @property
    def record(self) -> Record:
        """All that is known of it now."""
        if (child := OURS.get(self.folder)) is not None:
            child.process.poll()  # so that one that has ended is no zombie
        record = records.read_record(self.folder)
        if record is None:
            raise LlmkitError("the server's folder is gone: it was stopped long ago", "start it again: llmkit.serve(...)")
        return record

    @property
    def state(self) -> str:
        """starting, ready, failed, stopping, stopped or died."""
        return self.record.state

    @property
    def started_here(self) -> bool:
        """Whether this process started it."""
        return self.folder in OURS

    @property
    def pid(self) -> int:
        return self.record.pid

    @property
    def port(self) -> int | None:
        """None before it has one."""
        return self.record.port

    # ---- using it; these wait until it is ready

    @property
    def url(self) -> str:
        """http://127.0.0.1:PORT, where its chat page is."""
        return self.wait().record.url

    @property
    def base_url(self) -> str:
        """What OpenAI's clients want: `url` and /v1."""
        return f"{self.url}/v1"

    @property
    def model(self) -> str:
        """What requests call the model."""
        return self.wait().record.name

    @property
    def api_key(self) -> str:
        """The key it asks for, where this is known; else a word that passes where none is asked for."""
        words = records.read_json(self.folder / records.STARTED_FILE).get("words")
        keys = plan_of_words(words).server.api_keys if words else ()
        return next(iter(keys), "EMPTY")

    def client(self, **options: Any) -> openai.OpenAI:
        """OpenAI's own client for this server. options: those of `openai.OpenAI`."""
        openai = _openai()
        direct = openai.DefaultHttpxClient(trust_env=False)  # a proxy for the internet does not lead to this machine
        return openai.OpenAI(**{"base_url": self.base_url, "api_key": self.api_key, "http_client": direct} | options)

    def async_client(self, **options: Any) -> openai.AsyncOpenAI:
        """The same for async code."""
        openai = _openai()
        direct = openai.DefaultAsyncHttpxClient(trust_env=False)
        return openai.AsyncOpenAI(**{"base_url": self.base_url, "api_key": self.api_key, "http_client": direct} | options)

    def stats(self) -> dict[str, Any]:
        """The engine's counts now: requests, blocks, tokens, prefix cache."""
        return self.ask("/server_info").get("stats", {})

    def ask(self, path: str, timeout: float = 10.0) -> dict[str, Any]:
        """GET a path of it; the JSON of the answer."""
        import urllib.request

        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self.api_key}"})
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=timeout) as answer:
            return json.load(answer)

    def logs(self, n: int = 50) -> Lines:
        """The last n lines that it printed."""
        return tail(self.record.log, n)

    # ---- waiting and stopping

    def wait(self, timeout: float = START_TIMEOUT, on_change: Callable[[Record], None] | None = None) -> Server:
        """Return when it is ready. on_change: called with the record whenever that has changed.

        Raises the server's own error when it failed, ServerTimeoutError when it takes longer than `timeout` seconds."""
        for record in self.changes(timeout):
            if on_change:
                on_change(record)
            if record.state == "ready":
                return self
            if not record.alive:
                raise self.error()
        stage = self.record.stage or "its start"
        raise ServerTimeoutError(f"the server is not ready after {timeout:g} s; it is still at {stage!r}",
                                 "server.wait(timeout=...) waits on; server.logs() says what it does; server.stop() ends it")

    def wait_in_sight(self, timeout: float) -> Server:
        """`wait`, with the card on display where there is a notebook."""
        if in_notebook():
            self._ipython_display_()
        try:
            return self.wait(timeout)
        finally:
            self.refresh()

    def changes(self, timeout: float, at_least_every: float = math.inf) -> Iterator[Record]:
        """The record now and whenever it has changed, until it is neither starting nor stopping, for at most `timeout` seconds.
        at_least_every: seconds after which it comes although it has not changed."""
        end, last, told = time.monotonic() + timeout, None, 0.0
        while True:
            record, now = self.record, time.monotonic()
            if record != last or now - told >= at_least_every:
                last, told = record, now
                yield record
            if record.state not in ("starting", "stopping") or now >= end:
                return
            time.sleep(_LOOK)

    def error(self) -> LlmkitError:
        """Why it is not there, as its own typed error."""
        record = self.record
        if record.state == "stopped":
            return EngineUnavailableError("the server was stopped", "start it again: llmkit.serve(...), %llmkit serve")
        if record.error is None:
            lines = tail(record.log, 12)
            return ServerDiedError(f"the server's process ended; its last words:\n{lines}".rstrip(), "server.logs(200) has more")
        kind = getattr(errors, record.error["type"], LlmkitError)
        kind = kind if isinstance(kind, type) and issubclass(kind, LlmkitError) else LlmkitError
        return kind(record.error["message"], record.error.get("hint"))

    def stop(self, timeout: float = 10.0) -> None:
        """End it and everything it started, tidily within `timeout` seconds, else by force. Stopping twice is fine."""
        import psutil

        record, child = self.record, OURS.pop(self.folder, None)
        if child is not None:
            child.let_go()
        if records.is_running(record.pid, record.create_time):
            with contextlib.suppress(psutil.NoSuchProcess):  # it may be quicker than we are
                _end(psutil.Process(record.pid), timeout)
        if child is not None:
            child.process.wait()
        self._mark_stopped()
        self.refresh()

    def _mark_stopped(self) -> None:
        """What it wrote last may be "ready", if it had to be ended by force; a failure stays one."""
        path = self.folder / records.RUN_FILE
        said = records.read_json(path)
        if said.get("state") != "failed" and self.folder.exists():
            records.write_json(path, said | {"state": "stopping"})

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.started_here:
            self.stop()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Server) and other.folder == self.folder

    def __hash__(self) -> int:
        return hash(self.folder)

    # ---- how it looks

    @property
    def cards(self) -> list[Callable[[], None]]:
        """What shows it, whichever object it was shown by; each redraws itself."""
        return _CARDS.setdefault(self.folder, [])

    def refresh(self) -> None:
        """Redraw the cards that show it."""
        for card in self.cards:
            card()

    def __repr__(self) -> str:
        from llmkit.server.handle.card import card_text

        return card_text(self)

    def _repr_html_(self) -> str:
        from llmkit.server.handle.card import card_html

        return card_html(self)

    def _ipython_display_(self) -> None:
        from llmkit.notebook.live_card import show

        show(self)


def find(which: str | int | None = None, gone: bool = False) -> Server:
    """A living server: the newest that this process started, else the newest of all; or the one of this pid, port or model.

    gone: one that has ended will do, too."""
    candidates = [(Server(r.folder), r) for r in records.all_records() if gone or r.alive]
    named = [s for s, r in candidates if which is None or str(which) in _names(r)]
    if not named:
        what = f"no server is called {str(which)!r}" if candidates else "no server is running"
        there = ", ".join(f"{r.name} (pid {r.pid})" for _, r in candidates)
        raise EngineUnavailableError(what, f"there is: {there}" if there else "start one: %llmkit serve, or llmkit.serve()")
    return next((s for s in named if s.started_here), named[0])


def stop_servers(which: str | None = None) -> list[Server]:
    """Stop the one that `find` finds, or all; those that were stopped."""
    chosen = [Server(r.folder) for r in records.all_records() if r.alive] if which == "all" else [find(which)]
    for server in chosen:
        server.stop()
    return chosen


def _names(record: Record) -> set[str]:
    """What a server may be called."""
    return {str(record.pid), str(record.port), record.model, *record.served_model_names, record.url, f"{record.url}/v1"} - {""}


def _end(process: Any, timeout: float) -> None:
    """SIGTERM, and SIGKILL to what is left after `timeout`: the engine process and whatever else it started, too."""
    import psutil

    family = [process, *process.children(recursive=True)]
    process.terminate()
    for left in _wait(family, timeout):
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    _wait(family, 5)


def _wait(family: list[Any], timeout: float) -> list[Any]:
    """Those that still run after `timeout` seconds. One that has ended and waits for its parent to notice does not: the parent
    may be a notebook's kernel that has other things to do, and psutil.wait_procs would wait in vain."""
    end = time.monotonic() + timeout
    while True:
        left = [p for p in family if records.is_running(p.pid, p.create_time())]
        if not left or time.monotonic() >= end:
            return left
        time.sleep(0.02)


def _openai() -> Any:
    try:
        import openai
    except ModuleNotFoundError as e:
        raise LlmkitError("client() needs the package openai", "pip install openai") from e
    return openai


@atexit.register
def _stop_all() -> None:
    """The tidy path: all pipes close at once, and every server has a moment to leave by itself."""
    for child in OURS.values():
        child.let_go()
    for folder in list(OURS):
        with contextlib.suppress(LlmkitError):  # its folder was removed: there is nothing to tidy
            Server(folder).stop(timeout=3.0)
