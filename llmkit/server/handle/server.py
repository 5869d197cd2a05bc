"""`llmkit.serve(...) -> Server`: a server in a process of its own, held from a notebook, a script or a prompt.

Who outlives whom: the server runs in a session of its own, so the stop button, which interrupts the kernel's process group, does
not reach it; it watches its stdin, a pipe whose other end only this process holds, so it ends with this process, however that
ends. `atexit` is for the tidy path. Its folder (`handle.records`) lets any process find it again.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import hashlib
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit import __version__, errors
from llmkit.config import DEFAULT_MODEL
from llmkit.errors import EngineUnavailableError, LlmkitError, reject_unknown
from llmkit.interrupt import interrupt_afterwards
from llmkit.progress import in_notebook
from llmkit.server.handle import records
from llmkit.server.handle.logs import Lines, tail
from llmkit.server.handle.records import Record

if TYPE_CHECKING:
    import openai

    from llmkit.server.processes.serve_options import Plan

COMMAND = (sys.executable, "-m", "llmkit")
START_TIMEOUT = 600.0  # seconds; a model may have to be fetched first
_LOOK = 0.05  # seconds between two looks at the record


class _Child:
    """A server that this process started. pipe: our end of its stdin, which it lives on; no other process may hold it."""

    def __init__(self, argv: list[str], log: Path) -> None:
        theirs, self.pipe = os.pipe()
        try:
            with log.open("wb") as output:
                self.process = subprocess.Popen(argv, stdin=theirs, stdout=output, stderr=subprocess.STDOUT,
                                                start_new_session=True, env=_environment())  # fmt: skip
        finally:
            os.close(theirs)

    def let_go(self) -> None:
        """Close the pipe: the server ends."""
        pipe, self.pipe = self.pipe, -1
        if pipe >= 0:
            os.close(pipe)


_OURS: dict[Path, _Child] = {}
_CARDS: dict[Path, list[Callable[[], None]]] = {}


class ServerDiedError(LlmkitError, RuntimeError):
    """A server's process ended without saying why; the message ends with the last lines of its log."""


class ServerTimeoutError(LlmkitError, TimeoutError):
    """A server was not ready in time. It goes on starting."""


def serve(model: str | os.PathLike[str] = DEFAULT_MODEL, port: int = 0, *, wait: bool = True, timeout: float = START_TIMEOUT,
          reuse: bool = True, **options: Any) -> Server:
    """Serve a model in a process of its own, over OpenAI's protocol; the `Server`, ready.

        server = llmkit.serve("Qwen/Qwen2-7B-Instruct", max_model_len=2048)
        server.client().chat.completions.create(model=server.model, messages=[{"role": "user", "content": "Hello"}])

    port: 0 takes a free one. options: the flags of `llmkit serve`, with underscores; True and False switch, a list gives several
    values. The server ends with this process (`llmkit serve` in a terminal does not). reuse: a living server that was started
    with the same arguments is taken instead of a second one. wait=False returns at once; `url`, `client()` and `wait()` wait
    then. An interrupt ends the waiting, not the server. Raises the server's own error when it cannot start, ServerTimeoutError
    after `timeout` seconds.
    """
    server = start(command_words(model, {"port": port} | options), reuse)
    return server.wait_in_sight(timeout) if wait else server


def command_words(model: str | os.PathLike[str], options: dict[str, Any]) -> list[str]:
    """The words behind `llmkit` that say the same as these keyword arguments. Raises UnknownOptionError."""
    from llmkit.cli import build_parser, subcommands

    parser = subcommands(build_parser())["serve"]
    parser.complete_arguments()
    flags = {name: action for action in parser._actions for name in action.option_strings if name.startswith("--")}
    known = {name[2:].replace("-", "_") for name in flags} - {"help", "run_file", "watch_stdin"}
    reject_unknown(options, known, "llmkit.serve()")
    spelled = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    return ["serve", os.fspath(model), *(word for flag, value in spelled.items() for word in _flag(flag, value, flags))]


def _flag(flag: str, value: Any, flags: dict[str, Any]) -> list[str]:
    if value is None:
        return []
    action = flags.get(flag) or flags[flag.replace("-", "_").replace("__", "--", 1)]
    if action.nargs == 0:  # a switch
        off = "--no-" + flag[2:]
        return [flag] if value else [off] if off in flags else []
    if isinstance(value, (list, tuple)):
        several = [str(v) for v in value]
        return [flag, *several] if action.nargs in ("+", "*") else [f"{flag}={v}" for v in several]
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    return [flag, text] if action.nargs in ("+", "*") else [f"{flag}={text}"]


def start(words: Sequence[str], reuse: bool = True) -> Server:
    """The server that `llmkit WORDS` describes: a living one, else a new process. At once. UsageError for a wrong word."""
    from llmkit.hub.cache import locked

    plan = _plan(words)
    any_port = not hasattr(_parsed(words), "port")
    key = _key(plan, any_port)
    with locked(records.root() / key):
        living = next((r for r in records.all_records() if r.key == key and r.state in ("starting", "ready")), None)
        if living and reuse:
            return Server(living.folder)
        busy = any_port and _is_taken(plan.serving.host, plan.serving.port)
        return _launch([*words, *(["--port", "0"] if busy else [])], key, plan)


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    from llmkit.cli import parse

    return parse(words)


def _plan(words: Sequence[str]) -> Plan:
    """What the words mean; mistakes in them come to light here, before anything is started."""
    from llmkit.cli.serve import plan_of

    return plan_of(_parsed(words))


def _is_taken(host: str, port: int) -> bool:
    """Whether somebody listens there already. The usual port is taken where it is free, for it is what tutorials name."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: one that has just ended is no obstacle
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


def _key(plan: Plan, any_port: bool) -> str:
    """A digest of a server's options, of the Python that runs it, and of the GPUs that it sees."""
    meaning, folder = plan.to_plain(), Path(plan.engine.model).expanduser()
    meaning["serving"]["port"] = 0 if any_port else plan.serving.port
    meaning["engine"]["model"] = str(folder.resolve()) if folder.exists() else plan.engine.model
    about = [json.dumps(meaning, sort_keys=True), __version__, COMMAND, os.environ.get("CUDA_VISIBLE_DEVICES")]
    return hashlib.sha256(repr(about).encode()).hexdigest()[:16]


@interrupt_afterwards()  # a process without a record, or the other way round, could not be found again
def _launch(words: list[str], key: str, plan: Plan) -> Server:
    import psutil

    folder = records.new_folder()
    log = folder / records.LOG_FILE
    argv = [*COMMAND, *words, "--run-file", str(folder / records.RUN_FILE), "--watch-stdin"]
    child = _OURS[folder] = _Child(argv, log)
    born, me = psutil.Process(child.process.pid).create_time(), psutil.Process()
    records.write_json(folder / records.STARTED_FILE, {
        "pid": child.process.pid, "create_time": born, "key": key, "owner": [me.pid, me.create_time()],
        "words": words, "log": str(log), "model": plan.engine.model, "served_model_names": plan.names,
        "started": time.time()})  # fmt: skip
    return Server(folder)


def _environment() -> dict[str, str]:
    """The server imports the very llmkit that runs here."""
    from llmkit.notebook.run import checkout_roots

    path = os.pathsep.join([*checkout_roots(), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONUNBUFFERED": "1"} | ({"PYTHONPATH": path} if path else {})


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
        if (child := _OURS.get(self.folder)) is not None:
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
        return self.folder in _OURS

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
        keys = _plan(words).server.api_keys if words else ()
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

        record, child = self.record, _OURS.pop(self.folder, None)
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
    for left in psutil.wait_procs(family, timeout)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    psutil.wait_procs(family, 5)


def _openai() -> Any:
    try:
        import openai
    except ModuleNotFoundError as e:
        raise LlmkitError("client() needs the package openai", "pip install openai") from e
    return openai


@atexit.register
def _stop_all() -> None:
    """The tidy path: all pipes close at once, and every server has a moment to leave by itself."""
    for child in _OURS.values():
        child.let_go()
    for folder in list(_OURS):
        with contextlib.suppress(LlmkitError):  # its folder was removed: there is nothing to tidy
            Server(folder).stop(timeout=3.0)


def _forget() -> None:
    """A forked child must neither hold a server's pipe open after its parent's death, nor stop the server when it ends itself."""
    for child in _OURS.values():
        child.let_go()
    _OURS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
