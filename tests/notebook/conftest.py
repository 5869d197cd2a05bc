"""Real kernels, and servers that are not: `fake_server.py` keeps the contract of `llmkit serve` without a model."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import llmkit

HOUSE = Path(llmkit.__file__).parents[1]
FAKE = (sys.executable, str(Path(__file__).with_name("fake_server.py")))


class Kernel:
    """A real ipykernel that has loaded the extension. env: on top of this process's environment."""

    def __init__(self, env: dict[str, str]) -> None:
        from jupyter_client.manager import KernelManager

        path = os.pathsep.join([str(HOUSE), str(HOUSE / "kernels"), os.environ.get("PYTHONPATH", "")])
        self.manager = KernelManager()
        self.manager.start_kernel(extra_arguments=["--HistoryManager.hist_file=:memory:"],
                                  env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | env)  # fmt: skip
        self.connect()

    def connect(self) -> None:
        """To a kernel that has just been (re)started."""
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)
        self.run("%load_ext llmkit")

    def begin(self, code: str) -> str:
        return self.client.execute(code)

    def messages(self, request: str, timeout: float = 90) -> list[dict[str, Any]]:
        """Everything that this cell put out, when it is done: the contents, each with its type."""
        found = []
        while True:
            message = self.client.get_iopub_msg(timeout=timeout)
            if message["parent_header"].get("msg_id") != request:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                return found
            if kind not in ("status", "execute_input"):
                found.append({"type": kind, **content})

    def run(self, code: str) -> list[dict[str, Any]]:
        return self.messages(self.begin(code))

    def text(self, code: str) -> str:
        """What the code prints."""
        return "".join(o["text"] for o in self.run(code) if o["type"] == "stream").strip()

    def value(self, expression: str) -> str:
        """str of an expression."""
        return self.text(f"print(({expression}))")

    def interrupt(self) -> None:
        self.manager.interrupt_kernel()

    def restart(self) -> None:
        self.client.stop_channels()
        self.manager.restart_kernel(now=False)
        self.connect()

    def kill(self) -> None:
        """SIGKILL: nothing of its own code runs any more."""
        psutil.Process(self.manager.provisioner.pid).kill()

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Servers of these tests are kept apart from the user's."""
    folder = tmp_path_factory.mktemp("servers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMKIT_RUN_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def start_kernel(run_dir: Path) -> Iterator[Callable[..., Kernel]]:
    """fake -> a kernel, whose servers are fake ones or real."""
    kernels: list[Kernel] = []

    def start(fake: bool = True, **env: str) -> Kernel:
        kernels.append(Kernel({"LLMKIT_RUN_DIR": str(run_dir), **env}))
        if fake:
            kernels[-1].run(f"import llmkit.server.handle.start; llmkit.server.handle.start.COMMAND = {FAKE!r}")
        return kernels[-1]

    yield start
    for kernel in kernels:
        kernel.close()


@pytest.fixture
def fake_servers(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`llmkit.serve` of this process starts fake servers; none is left behind."""
    from llmkit.server.handle import start
    from llmkit.server.handle.server import stop_servers

    monkeypatch.setattr(start, "COMMAND", FAKE)
    yield
    stop_servers("all")


def gone_within(pid: int, seconds: float) -> bool:
    """Whether the process ends in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def ends() -> Callable[[int, float], bool]:
    return gone_within
