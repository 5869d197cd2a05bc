"""Real servers, as a shell would start them; each test ends with none of their processes left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import llmkit

HOUSE = Path(llmkit.__file__).parents[1]
PATIENCE = 60.0  # seconds; a start takes 3 on a quiet machine


class Serving:
    """A server in a process of its own. Every wait is bounded; what does not come fails the test with the log."""

    def __init__(self, folder: Path, words: list[str], stdin: Any = subprocess.DEVNULL,
                 command: tuple[str, ...] = ("llmkit", "serve")) -> None:  # fmt: skip
        self.run_file, self.log = folder / "run.json", folder / "log"
        env = os.environ | {"PYTHONPATH": f"{HOUSE}:{HOUSE / 'kernels'}", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        argv = [sys.executable, "-m", *command, *words, "--run-file", str(self.run_file)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(argv, stdin=stdin, stdout=log, stderr=log, env=env, start_new_session=True)
        self._clients = threading.local()
        self.family: set[psutil.Process] = set()

    @property
    def http(self) -> httpx.Client:
        """This thread's client, with a new connection for each request: httpx closes one thread's under another's hands."""
        if not hasattr(self._clients, "mine"):
            one_use = httpx.Limits(max_keepalive_connections=0)
            self._clients.mine = httpx.Client(timeout=PATIENCE, trust_env=False, verify=False, limits=one_use)
        return self._clients.mine

    def until(self, what: str, holds: Callable[[], Any], seconds: float = PATIENCE) -> Any:
        """Wait for something to hold; what it was."""
        end = time.monotonic() + seconds
        while not (value := holds()):
            assert time.monotonic() < end, f"{what} did not come\n{self.log.read_text()}"
            time.sleep(0.02)
        return value

    @property
    def state(self) -> dict[str, Any]:
        return json.loads(self.run_file.read_text()) if self.run_file.exists() else {"state": None}

    def ready(self) -> Serving:
        def ended_or_ready() -> bool:
            return self.state["state"] == "ready" or self.process.poll() is not None

        self.until("readiness", ended_or_ready)
        assert self.process.poll() is None, self.log.read_text()
        self.remember()
        return self

    def remember(self) -> list[psutil.Process]:
        """Its processes; they are looked for again at the end."""
        me = psutil.Process(self.process.pid)
        self.family |= {me, *me.children(recursive=True)}
        return me.children(recursive=True)

    @property
    def url(self) -> str:
        return self.state["url"]

    def get(self, path: str) -> Any:
        return self.http.get(self.url + path)

    def info(self) -> dict[str, Any]:
        return self.get("/server_info").raise_for_status().json()

    def stats(self) -> dict[str, Any]:
        return self.info()["stats"]

    def healthy(self) -> bool:
        return self.get("/health").status_code == 200

    def body(self, prompt: Any = "Once upon", max_tokens: int = 16, **options: Any) -> dict[str, Any]:
        """A completion that goes on to max_tokens."""
        model = self.state["served_model_names"][0]
        return {"model": model, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0} | options

    def complete(self, **options: Any) -> dict[str, Any]:
        return self.http.post(f"{self.url}/v1/completions", json=self.body(**options)).raise_for_status().json()

    def stream(self, **options: Any) -> Any:
        """An open streamed completion: a context manager of httpx."""
        return self.http.stream("POST", f"{self.url}/v1/completions", json=self.body(**options) | {"stream": True})

    @staticmethod
    def events(response: httpx.Response) -> Iterator[Any]:
        """The JSON events of an SSE answer."""
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line[6:])

    @staticmethod
    def text_of(found: list[Any]) -> str:
        """What the events of a completion say."""
        return "".join(e["choices"][0]["text"] for e in found if e.get("choices"))

    def wait(self, seconds: float = 20.0) -> int:
        """Its exit code."""
        return self.process.wait(seconds)

    def close(self) -> None:
        """End it by force if need be; then nothing of it may run."""
        if self.process.poll() is None:
            self.remember()
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            finally:
                for process in (p for p in self.family if p.is_running()):
                    process.kill()
        _, left = psutil.wait_procs(self.family, 5)
        assert not left, f"orphans: {left}"


@pytest.fixture
def start(tmp_path: Path, dummy_folder: Path) -> Iterator[Callable[..., Serving]]:
    """start(*flags) -> a server of the dummy model that is still starting."""
    servers: list[Serving] = []

    def begin(*flags: str, model: str | Path = dummy_folder, weights: str = "dummy", **how: Any) -> Serving:
        folder = tmp_path / str(len(servers))
        folder.mkdir()
        named = () if how.get("command") else (str(model),)
        servers.append(Serving(folder, [*named, "--load-format", weights, "--port", "0", *flags], **how))
        return servers[-1]

    yield begin
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def start_once(tmp_path_factory: pytest.TempPathFactory, dummy_folder: Path) -> Iterator[Callable[..., Serving]]:
    """start_once(*flags) -> a ready server of the dummy model for the tests of a file."""
    servers: list[Serving] = []

    def begin(*flags: str) -> Serving:
        words = [str(dummy_folder), "--load-format", "dummy", "--port", "0", "--max-model-len", "2048", *flags]
        servers.append(Serving(tmp_path_factory.mktemp("server"), words))
        return servers[-1].ready()

    yield begin
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def server(start_once: Callable[..., Serving]) -> Serving:
    """One server of the dummy model for the tests of a file."""
    return start_once("--served-model-name", "dummy")
