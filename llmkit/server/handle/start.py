"""`llmkit.serve(...) -> Server`: a server in a process of its own, started from a notebook, a script or a prompt."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit import __version__
from llmkit.config import DEFAULT_MODEL
from llmkit.interrupt import interrupt_afterwards
from llmkit.server.handle import records
from llmkit.server.handle.child import OURS, Child
from llmkit.server.handle.server import START_TIMEOUT, Server
from llmkit.server.handle.words import command_words, parsed, plan_of_words

if TYPE_CHECKING:
    from llmkit.server.processes.serve_options import Plan

COMMAND = (sys.executable, "-m", "llmkit")


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


def start(words: Sequence[str], reuse: bool = True) -> Server:
    """The server that `llmkit WORDS` describes: a living one, else a new process. At once. UsageError for a wrong word."""
    from llmkit.hub.cache import locked

    plan = plan_of_words(words)
    any_port = not hasattr(parsed(words), "port")
    key = _key(plan, any_port)
    with locked(records.root() / key):
        living = next((r for r in records.all_records() if r.key == key and r.state in ("starting", "ready")), None)
        if living and reuse:
            return Server(living.folder)
        busy = any_port and _is_taken(plan.serving.host, plan.serving.port)
        return _launch([*words, *(["--port", "0"] if busy else [])], key, plan)


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
    child = OURS[folder] = Child(argv, log)
    born, me = psutil.Process(child.process.pid).create_time(), psutil.Process()
    records.write_json(folder / records.STARTED_FILE, {
        "pid": child.process.pid, "create_time": born, "key": key, "owner": [me.pid, me.create_time()],
        "words": words, "log": str(log), "model": plan.engine.model, "served_model_names": plan.names,
        "started": time.time()})  # fmt: skip
    return Server(folder)
