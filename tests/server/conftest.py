"""One server for all tests of the endpoints: the real default model, in this process, behind a real socket."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from prompted import PromptedEngine
from stub_engine import StubEngine

from llmkit import LLM
from llmkit.server.app import create_app
from llmkit.server.in_process import InProcessEngine
from llmkit.server.options import ServerOptions

NAME = "smollm2"


@dataclass
class Running:
    """A server with its address, and the engine behind it."""

    url: str
    engine: Any

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"


@contextmanager
def serving(engine: Any, options: ServerOptions) -> Iterator[Running]:
    """`create_app(engine, options)` by uvicorn in a thread, on a free port."""
    import uvicorn

    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(engine, options), log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not server.started and time.monotonic() < end:
        time.sleep(0.01)
    assert server.started
    try:
        yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", engine)
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def llm(smollm2_folder: Path) -> Iterator[LLM]:
    """SmolLM2 in float32: what it says does not depend on who runs beside it."""
    with LLM(smollm2_folder, max_model_len=1024, dtype="float32") as llm:
        yield llm


@pytest.fixture(scope="session")
def server(llm: LLM) -> Iterator[Running]:
    """The server that most tests share."""
    with serving(InProcessEngine(llm), ServerOptions(served_model_names=(NAME, "another-name"))) as running:
        yield running


@pytest.fixture
def serve(llm: LLM) -> Iterator[Callable[..., Running]]:
    """Servers with options of their own, over the same model: serve(api_keys=("a",))."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield lambda engine=None, **options: stack.enter_context(
            serving(engine or InProcessEngine(llm), ServerOptions(**{"served_model_names": (NAME,), **options}))
        )


@pytest.fixture
def scripted(smollm2_folder: Path) -> Callable[..., PromptedEngine]:
    """scripted(script, delay=0): an engine without a model that says `script`, or what it makes of a prompt's text."""
    return lambda script, delay=0.0: PromptedEngine(smollm2_folder, script if callable(script) else lambda _: script, delay)


@pytest.fixture
def stub(serve: Callable[..., Running], llm: LLM) -> Callable[..., Running]:
    """Servers over a StubEngine: stub({options of the server}, pieces=..., delay=..., error=...)."""

    def start(options: dict[str, Any] | None = None, **how: Any) -> Running:
        plain = {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
        return serve(StubEngine(llm.get_tokenizer(), **how), **(plain | (options or {})))

    return start
