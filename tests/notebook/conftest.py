"""Real kernels, and servers that are not: `fake_server.py` keeps the contract of `llmkit serve` without a model."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from real_kernel import Kernel

FAKE = (sys.executable, str(Path(__file__).with_name("fake_server.py")))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Servers of these tests are kept apart from the user's."""
    folder = tmp_path_factory.mktemp("servers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMKIT_RUN_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def start_kernel(run_dir: Path) -> Iterator[Callable[..., Kernel]]:
    """fake -> a kernel with the extension, whose servers are fake ones or real."""
    kernels: list[Kernel] = []

    def start(fake: bool = True, **own: str) -> Kernel:
        kernels.append(Kernel("%load_ext llmkit", **{"LLMKIT_RUN_DIR": str(run_dir), **own}))
        if fake:
            kernels[-1].run(f"import llmkit.server.handle.start; llmkit.server.handle.start.COMMAND = {FAKE!r}")
        return kernels[-1]

    yield start
    for kernel in kernels:
        kernel.close()


@pytest.fixture
def fake_servers(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`llmkit.serve` of this process starts fake servers; none is left behind. Those of kernels end with them."""
    from llmkit.server.handle import records, start
    from llmkit.server.handle.server import Server

    monkeypatch.setattr(start, "COMMAND", FAKE)
    yield
    for server in [Server(r.folder) for r in records.all_records() if r.alive]:
        if server.started_here:
            server.stop()


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
