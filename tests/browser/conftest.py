"""A real JupyterLab and Debian's Chromium. Without Chromium these tests are skipped, but fail in CI."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from own_process import environment

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The browser. Not for the whole session: while it lives its event loop runs here, and no test could run one of its own."""
    program = shutil.which("chromium")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("there is no chromium: apt-get install -y chromium")
        pytest.skip("there is no chromium: apt-get install -y chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, headless=True, args=FLAGS)
        yield browser
        browser.close()


class Page:
    """A page that remembers everything its console complained about."""

    def __init__(self, page: Any) -> None:
        self.page, self.complaints = page, []
        page.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: self.complaints.append(str(e)))

    def picture(self, name: str) -> None:
        """For the eye, where BROWSER_PICTURES names a folder."""
        if folder := os.environ.get("BROWSER_PICTURES"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=f"{folder}/{name}.png")


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., Page]]:
    """url, dark -> a page in a context of its own."""
    contexts = []

    def open_(url: str, dark: bool = False) -> Page:
        contexts.append(chromium.new_context(color_scheme="dark" if dark else "light", viewport={"width": 1200, "height": 1000}))
        page = Page(contexts[-1].new_page())
        page.page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()


@contextmanager
def jupyter_lab(folder: Path, dark: bool) -> Iterator[str]:
    """JupyterLab on `folder`, alone in the world; its address with `{}` where a notebook's name goes."""
    settings = folder / ".settings" / "@jupyterlab"
    theme = "JupyterLab Dark" if dark else "JupyterLab Light"
    for name, value in (("notebook-extension/tracker", {"windowingMode": "none"}),
                        ("apputils-extension/themes", {"theme": theme}),
                        ("apputils-extension/notification", {"fetchNews": "false", "checkForUpdates": False})):  # fmt: skip
        path = settings / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, hidden = secrets.token_hex(8), folder / ".jupyter"
    own = {"JUPYTERLAB_SETTINGS_DIR": folder / ".settings", "JUPYTERLAB_WORKSPACES_DIR": hidden / "workspaces",
           "JUPYTER_RUNTIME_DIR": hidden / "runtime", "JUPYTER_CONFIG_DIR": hidden / "config",
           "JUPYTER_DATA_DIR": hidden / "data", "IPYTHONDIR": hidden / "ipython",
           "LLMKIT_RUN_DIR": hidden / "servers"}  # fmt: skip
    command = [sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}",
               "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
               "--LabApp.extension_manager=readonly"]  # fmt: skip
    with open(folder / "lab.log", "wb") as log:
        lab = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                               env=environment(**{k: str(v) for k, v in own.items()}))  # fmt: skip
    try:
        _wait_until_up(f"http://127.0.0.1:{port}/api?token={token}", lab, folder / "lab.log")
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}&reset"
    except BaseException:
        print((folder / "lab.log").read_text("utf-8", "replace")[-4000:])  # what Lab itself says of a test that fails
        raise
    finally:
        lab.terminate()
        lab.wait(20)


def _wait_until_up(url: str, lab: subprocess.Popen[bytes], log: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while lab.poll() is None and time.monotonic() < end:
        try:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


@pytest.fixture
def lab() -> Callable[[Path, bool], Any]:
    """folder, dark -> a JupyterLab, as a context manager."""
    return jupyter_lab
