"""Who serves on this machine: one folder a server, from which any process of this user finds it again.

`started.json` is written by the handle that started the server, `run.json` by the server itself at every change of state,
`server.log` is what it prints. A folder outlives its server, so that the log of a failure can still be read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.hub.cache import cache_root

if TYPE_CHECKING:
    from llmkit.server.processes.serve_options import Plan

RUN_FILE, STARTED_FILE, LOG_FILE = "run.json", "started.json", "server.log"
KEPT = 20  # folders of servers that are gone


@dataclass(frozen=True)
class Record:
    """What is known of a server. state: starting, ready, failed, stopping, or (its process is gone) stopped, died.

    key: a digest of its options. owner: (pid, create time) of the process whose end it does not outlive, None for a server of
    its own. stages: seconds that each finished stage of the start took; stage: the present one. error: type, message and hint.
    """

    folder: Path
    state: str
    pid: int
    create_time: float
    key: str = ""
    owner: tuple[int, float] | None = None
    url: str = ""
    port: int | None = None
    model: str = ""
    served_model_names: tuple[str, ...] = ()
    log: Path | None = None
    stages: dict[str, float] = field(default_factory=dict)
    stage: str = ""
    error: dict[str, Any] | None = None
    started: float = 0.0

    @property
    def alive(self) -> bool:
        return self.state in ("starting", "ready", "stopping")

    @property
    def name(self) -> str:
        """What requests call the model."""
        return self.served_model_names[0] if self.served_model_names else self.model


def root() -> Path:
    """The folder of these folders: `LLMKIT_RUN_DIR`, else `servers` in llmkit's cache. Not created here."""
    given = os.environ.get("LLMKIT_RUN_DIR")
    return Path(given).expanduser() if given else cache_root() / "servers"


def read_record(folder: Path) -> Record | None:
    """The record in `folder`; None where no server was ever started."""
    started, run = read_json(folder / STARTED_FILE), read_json(folder / RUN_FILE)
    said = started | {k: v for k, v in run.items() if v is not None}
    if not said.get("pid"):
        return None
    owner = started.get("owner")
    return Record(
        folder, _state(said), said["pid"], said["create_time"], started.get("key", ""), tuple(owner) if owner else None,
        (said.get("url") or "").rstrip("/"), said.get("port"), said.get("model", ""), tuple(said.get("served_model_names") or ()),
        Path(said["log"]) if said.get("log") else None, said.get("stages") or {}, said.get("stage") or "", said.get("error"),
        started.get("started", said["create_time"]))  # fmt: skip


def _state(said: dict[str, Any]) -> str:
    state = said.get("state", "starting")
    if state == "failed" or is_running(said["pid"], said["create_time"]):
        return state
    return "stopped" if state == "stopping" else "died"


def is_running(pid: int, create_time: float) -> bool:
    """Whether that very process runs, and not another one that got its number later."""
    import psutil

    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - create_time) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def all_records() -> list[Record]:
    """Every record there is, the newest first."""
    if not root().is_dir():
        return []
    found = [record for folder in root().iterdir() if folder.is_dir() and (record := read_record(folder))]
    return sorted(found, key=lambda r: -r.started)


def new_folder() -> Path:
    """An empty folder for a server, private to this user; the oldest ones of servers that are gone make room for it."""
    for old in [r for r in all_records() if not r.alive][KEPT:]:
        shutil.rmtree(old.folder, ignore_errors=True)
    folder = root() / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{time.monotonic_ns() % 1_000_000:06}"
    folder.mkdir(parents=True, mode=0o700)
    return folder


def with_run_file(plan: Plan) -> Plan:
    """A server that nobody gave a run file writes one here, so that a notebook or another terminal finds it, too."""
    if plan.serving.run_file is not None:
        return plan
    try:
        path = new_folder() / RUN_FILE
    except OSError:  # a home that cannot be written is no reason not to serve
        return plan
    return dataclasses.replace(plan, serving=dataclasses.replace(plan.serving, run_file=str(path)))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """All of it or nothing."""
    new = path.with_suffix(f".{os.getpid()}.new")
    new.write_text(json.dumps(value), "utf-8")
    new.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
