"""One server for all tests of the endpoints: the real default model, in this process, behind a real socket."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
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


class PromptedEngine:
    """An engine that says what `script` answers to a prompt's text, a token a chunk. prompts: what it was asked."""

    healthy = True

    def __init__(self, folder: Path, script: Callable[[str], str], delay: float = 0.0) -> None:
        from llmkit.server.engine_client import EngineFacts
        from llmkit.tokenizer import Tokenizer

        self.tokenizer, self.script, self.delay = Tokenizer.from_folder(folder), script, delay
        self.facts = EngineFacts("scripted", str(folder), 4096, 8, self.tokenizer.vocab_size, 64, "float32", "paper")
        self.prompts: list[str] = []
        self.params: list[Any] = []
        self.running = 0

    async def stream(self, prompt: Any, params: Any, *, request_id: str, priority: int = 0) -> AsyncIterator[Any]:
        from llmkit.detokenizer import Detokenizer
        from llmkit.outputs import StreamChunk

        self.prompts.append(prompt.text)
        self.params.append(params)
        self.running += 1
        try:
            said = self.script(prompt.text)
            if isinstance(said, Exception):
                raise said
            said, *breaks = [said] if isinstance(said, str) else said
            ids = self.tokenizer.encode(said, False)
            text = Detokenizer(self.tokenizer, params)
            limit = params.max_tokens or 4000
            for i, token in enumerate(ids[:limit]):
                await asyncio.sleep(self.delay)
                if breaks and i + 1 == len(ids):
                    raise breaks[0]
                piece = text.push([token])
                if text.stop_reason or i + 1 == min(len(ids), limit):
                    reason = "stop" if text.stop_reason or i + 1 == len(ids) else "length"
                    piece += text.flush()
                    whole = self._output(prompt, text, ids[: i + 1], reason, request_id)
                    yield StreamChunk(piece, [token], finish_reason=reason, output=lambda w=whole: w)
                    return
                running = self._output(prompt, text, ids[: i + 1], None, request_id)
                yield StreamChunk(piece, [token], output=lambda w=running: w)
            whole = self._output(prompt, text, [], "stop", request_id)
            yield StreamChunk("", [], finish_reason="stop", output=lambda: whole)
        finally:
            self.running -= 1

    def _output(self, prompt: Any, text: Any, ids: list[int], reason: str | None, request_id: str) -> Any:
        from llmkit.outputs import CompletionOutput, RequestOutput

        answer = CompletionOutput(0, text.text, list(ids), finish_reason=reason, stop_reason=text.stop_reason)
        return RequestOutput(request_id, prompt.text, prompt.ids, [answer], reason is not None, num_cached_tokens=3)

    async def generate(self, prompt: Any, params: Any, *, request_id: str, priority: int = 0) -> Any:
        chunks = [c async for c in self.stream(prompt, params, request_id=request_id)]
        return chunks[-1].output()

    def stats(self) -> dict[str, Any]:
        return {}


@pytest.fixture
def scripted(smollm2_folder: Path) -> Callable[..., PromptedEngine]:
    """scripted(script, delay=0): an engine without a model. script: a text, an exception, a text at whose end an exception
    comes, or what makes one of these of a prompt."""
    return lambda script, delay=0.0: PromptedEngine(smollm2_folder, script if callable(script) else lambda _: script, delay)


@pytest.fixture
def stub(serve: Callable[..., Running], llm: LLM) -> Callable[..., Running]:
    """Servers over a StubEngine: stub({options of the server}, pieces=..., delay=..., error=...)."""

    def start(options: dict[str, Any] | None = None, **how: Any) -> Running:
        plain = {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
        return serve(StubEngine(llm.get_tokenizer(), **how), **(plain | (options or {})))

    return start
