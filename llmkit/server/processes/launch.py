"""From a plan to a server that runs until it is told to stop: listen, start engine and fronts, say so, drain, end."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import socket
import sys
import time
from pathlib import Path

from llmkit.config import EngineConfig
from llmkit.errors import ConfigError, LlmkitError
from llmkit.server.handle.records import with_run_file
from llmkit.server.processes.address import allow_many_connections, listen, url_of
from llmkit.server.processes.aside import aside
from llmkit.server.processes.front import log_to_stderr
from llmkit.server.processes.fronts import fronts
from llmkit.server.processes.keeper import EngineKeeper
from llmkit.server.processes.lifeline import when_stdin_closes
from llmkit.server.processes.pulse import every
from llmkit.server.processes.run_file import RunFile
from llmkit.server.processes.serve_options import Plan
from llmkit.server.processes.wire import Stage, Start

FINDING = "find the model"


def launch(plan: Plan) -> int:
    """Serve until told to stop; the exit code. Raises the error of a start that failed, after telling it in the run file."""
    if not hasattr(socket, "AF_UNIX") or sys.platform == "win32":
        raise ConfigError("the server's processes talk through Unix sockets, which this system does not have",
                          "run it in WSL, or use LLM(...) in Python")  # fmt: skip
    log_to_stderr(plan.serving.log_level)
    allow_many_connections()
    plan = with_run_file(plan)
    run_file = RunFile(plan.serving.run_file, model=plan.engine.model, served_model_names=list(plan.names),
                       stage=FINDING)  # fmt: skip
    try:
        with listen(plan.serving) as sock:
            port = None if plan.serving.uds else sock.getsockname()[1]
            run_file.update(url=url_of(sock, plan.serving), host=plan.serving.host, port=port)
            return asyncio.run(Launcher(plan, sock, run_file).run())
    except LlmkitError as e:
        run_file.fail(e)
        raise
    except Exception as e:
        run_file.fail(LlmkitError(f"the server failed: {type(e).__name__}: {e}", "its log has the traceback"))
        raise
    finally:
        if plan.serving.uds:
            Path(plan.serving.uds).unlink(missing_ok=True)


class Launcher:
    """Runs engine and fronts, and hears signals."""

    def __init__(self, plan: Plan, listening: socket.socket, run_file: RunFile) -> None:
        self._plan, self._run_file, self._began = plan, run_file, time.monotonic()
        self._keeper = EngineKeeper(self._on_stage, plan.serving.engine_timeout)
        self._fronts = fronts(plan, listening, self._keeper)
        self._stop_asked, self._hurry = asyncio.Event(), asyncio.Event()
        self._exit_code, self._seconds = 0, plan.serving.shutdown_timeout
        self._stages: dict[str, float] = {}

    async def run(self) -> int:
        """Until told to stop; the exit code."""
        loop = asyncio.get_running_loop()
        order, home = loop.create_future(), loop.create_future()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        if self._plan.serving.watch_stdin:
            when_stdin_closes(lambda: loop.call_soon_threadsafe(self._stop_now, 0))
        work = {asyncio.create_task(w) for w in (self._keeper.run(order), self._fronts.run(home), self._start(order, home))}
        try:
            await self._until_stopped(work)
            await self._drain()
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
        return self._exit_code

    async def _until_stopped(self, work: set[asyncio.Task[None]]) -> None:
        """Raises what any of `work` raises."""
        stop = asyncio.create_task(self._stop_asked.wait())
        try:
            while not stop.done():
                await asyncio.wait({stop, *work}, return_when=asyncio.FIRST_COMPLETED)
                for task in [t for t in work if t.done()]:
                    work.remove(task)
                    await task
        except* LlmkitError as group:
            raise _first(group) from None
        finally:
            stop.cancel()

    # ---- the start

    async def _start(self, order: asyncio.Future[Start], home: asyncio.Future[Path]) -> None:
        """Find the model, tell engine and fronts, wait for both, say so."""
        begin, config = time.monotonic(), self._plan.engine
        folder, tokenizer = await aside(find_model, config)
        self._stages[FINDING] = time.monotonic() - begin
        found = dataclasses.replace(config, model=str(folder), tokenizer=str(tokenizer))
        order.set_result(Start(dataclasses.asdict(found), config.model, every(self._plan.serving.engine_timeout)))
        if self._plan.server.chat_template is not None:
            await aside(check_template, tokenizer, self._plan)
        home.set_result(tokenizer)
        await self._fronts.wait_until_up()
        await self._keeper.ready.wait()
        self._announce()

    def _on_stage(self, stage: Stage) -> None:
        """The engine is at another stage of its start. While the model is still being fetched, that is what it waits for."""
        if self._keeper.was_ready:
            return
        if FINDING not in self._stages:
            stage = Stage(FINDING, stage.done)
        self._fronts.tell(stage)
        self._run_file.update(stage=stage.name, stages=stage.done | self._stages)

    def _announce(self) -> None:
        """The one line, and the run file."""
        info, seconds = self._keeper.info, time.monotonic() - self._began
        self._run_file.update(state="ready", stage=None, stages=info["stages"] | self._stages | {"until ready": seconds})
        facts = self._run_file.facts
        context = f"KV cache {info['kv_tokens']:,} tokens, ready in {seconds:.1f} s"
        line = f"llmkit: {self._plan.names[0]} is served at {facts['url']}; {context}"
        print("; ".join([line, *info["notes"]]), flush=True)

    # ---- the end

    def _on_signal(self, number: int) -> None:
        if self._stop_asked.is_set():
            self._stop_now(128 + number)
            return
        if number == signal.SIGINT:
            print("\nllmkit: stopping; Ctrl-C again ends open requests", file=sys.stderr, flush=True)
        self._stop_asked.set()

    def _stop_now(self, exit_code: int) -> None:
        self._exit_code, self._seconds = exit_code, 0.0
        self._stop_asked.set()
        self._hurry.set()

    async def _drain(self) -> None:
        """Let open requests end, for so long."""
        self._run_file.update(state="stopping")
        drain = asyncio.create_task(self._fronts.stop(self._seconds))
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({drain, hurry}, return_when=asyncio.FIRST_COMPLETED)
        if not drain.done():
            drain.cancel()
            await self._fronts.stop(0.0)
        hurry.cancel()


def find_model(config: EngineConfig) -> tuple[Path, Path]:
    """The folders of the model and of its tokenizer; fetched if need be."""
    from llmkit import hub

    where = {"source": config.source, "revision": config.revision, "cache_dir": config.download_dir}
    folder = hub.resolve(config.model, **where)
    own = Path(config.tokenizer or folder).expanduser()
    home = own if any(own.glob("tokenizer*")) else hub.resolve(config.tokenizer or str(folder), **where)
    return Path(folder), Path(home)


def check_template(home: Path, plan: Plan) -> None:
    """A chat template that is not there is a failed start, not a failed request."""
    from llmkit.chat import find_template
    from llmkit.tokenizer import Tokenizer

    find_template(Tokenizer.from_folder(home, plan.engine.trust_remote_code), plan.server.chat_template)


def _first(group: BaseExceptionGroup[LlmkitError]) -> LlmkitError:
    found = group.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found
