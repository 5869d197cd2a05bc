"""The engine's process: mail, step, answer; the same `Engine.step` that `LLM` drives, one message a step to each front.

Its main thread does all of it. It ends when its supervisor does, whatever it is doing (`lifeline`); a front that dies takes its
requests with it and nothing else.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from llmkit.config import EngineConfig
from llmkit.engine.request import Request
from llmkit.errors import EngineUnavailableError, InvalidRequestError, LlmkitError
from llmkit.garbage import nothing_is_garbage, spare_what_is_there
from llmkit.outputs import Logprob
from llmkit.sampling_params import SamplingParams, StructuredOutputs
from llmkit.server.processes.child import SAY_WHERE
from llmkit.server.processes.lifeline import when_stdin_closes
from llmkit.server.processes.pulse import Pulse
from llmkit.server.processes.wire import (
    Add,
    Alive,
    Begun,
    Channel,
    End,
    Ended,
    Failed,
    Gone,
    NewFront,
    Ready,
    Refused,
    Stage,
    Start,
    Step,
)

if TYPE_CHECKING:
    from llmkit.engine.engine import Engine, StepOutput
    from llmkit.engine.grammar import Grammar
    from llmkit.engine.start import Started

STATS_EVERY = 0.25  # seconds between two counts sent to a front that gets no tokens


class Compiler:
    """A thread for what may take long, and a descriptor that is readable when some of it is done."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(1, "llmkit-grammars")
        self._done: deque[tuple[Any, Any]] = deque()
        self._readable, self._writable = os.pipe()

    def fileno(self) -> int:
        return self._readable

    def submit(self, work: Callable[[], Any], tag: Any) -> None:
        """Have `work` done; `results` has the tag with what it returned, or with the LlmkitError that it raised."""
        self._threads.submit(self._run, work, tag)

    def _run(self, work: Callable[[], Any], tag: Any) -> None:
        try:
            outcome = work()
        except LlmkitError as e:
            outcome = e
        except Exception as e:  # a library's own failure: this request's end, and nobody else's
            traceback.print_exc()
            what = f"structured_outputs cannot be used: {type(e).__name__}: {e}"
            outcome = InvalidRequestError(what, param="structured_outputs")
        self._done.append((tag, outcome))
        os.write(self._writable, b".")

    def results(self) -> Iterator[tuple[Any, Any]]:
        """(tag, outcome) of what is done by now."""
        os.read(self._readable, 4096)
        while self._done:
            yield self._done.popleft()


class Front:
    """A front, as the engine sees it: what it asked for, and what the present step has for it."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.requests: dict[int, Request] = {}
        self.compiling: set[int] = set()  # first handles of those whose grammars are being compiled
        self.handles: list[int] = []
        self.tokens: list[int] = []
        self.logprobs: list[tuple[int, list[tuple[int, float, int | None]]]] = []
        self.begun: list[Begun] = []
        self.ended: list[Ended] = []
        self.last_stats: tuple[float, dict[str, Any]] = (0.0, {})

    def send_step(self, stats: dict[str, Any], busy: bool) -> None:
        """Send what has gathered, and the counts, if anything is new. busy: there will be another step soon."""
        now = time.monotonic()
        at, known = self.last_stats
        if not self.handles and not self.ended and (stats == known or (busy and now - at < STATS_EVERY)):
            return
        handles, tokens = np.array(self.handles, np.int32).tobytes(), np.array(self.tokens, np.int32).tobytes()
        message = Step(handles, tokens, self.logprobs, self.begun, self.ended, stats)
        self.handles, self.tokens, self.logprobs, self.begun, self.ended = [], [], [], [], []
        self.last_stats = (now, stats)
        self.channel.send(message)


class EngineServer:
    """Runs a started engine for its fronts until the supervisor is gone. alive_every: see Start."""

    def __init__(self, started: Started, eos_ids: tuple[int, ...], control: Channel, alive_every: float = 0.0) -> None:
        self._started, self._eos_ids, self._control = started, eos_ids, control
        self._engine: Engine = started.engine
        self.pulse = Pulse(alive_every, lambda: control.send(Alive()))
        self._engine.token_text = _no_text  # fronts have a tokenizer, and more time
        self._owners: dict[Request, tuple[Front, int]] = {}
        self._silent: set[Request] = set()  # those without a token yet
        self._compiler = Compiler()
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ, self._hear_supervisor)
        self._selector.register(self._compiler, selectors.EVENT_READ, self._hear_compiler)

    def run(self) -> None:
        """Serve, until Gone says that the supervisor is."""
        while True:
            self.pulse.beat()
            self._read_mail()
            self._step()
            self._report()

    # ---- mail

    def _read_mail(self) -> None:
        """Everything that has come; waits for something to come when there is nothing to do."""
        for key, events in self._selector.select(0 if self._engine.has_work else self.pulse.every or None):
            if not isinstance(key.data, Front):
                key.data()
                continue
            with self._losing(key.data):
                if events & selectors.EVENT_WRITE:
                    key.data.channel.flush()
                if events & selectors.EVENT_READ:
                    self._hear_front(key.data)
                self._watch(key.data)

    def _hear_supervisor(self) -> None:
        for message in self._control.receive():
            if isinstance(message, NewFront):
                front = Front(Channel(self._control.take_socket()))
                self._selector.register(front.channel, selectors.EVENT_READ, front)

    def _hear_front(self, front: Front) -> None:
        for message in front.channel.receive():
            if isinstance(message, Add):
                self._add(front, message)
            elif isinstance(message, End):
                front.compiling.difference_update(message.handles)
                self._end([r for h in message.handles if (r := front.requests.get(h))])

    def _watch(self, front: Front) -> None:
        """Hear of room in the socket exactly while something waits for it."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if front.channel.full else 0)
        if self._selector.get_key(front.channel).events != events:
            self._selector.modify(front.channel, events, front)

    @contextmanager
    def _losing(self, front: Front) -> Iterator[None]:
        """A front that is gone takes its requests with it."""
        try:
            yield
        except Gone:
            self._end(list(front.requests.values()))
            front.compiling.clear()
            self._selector.unregister(front.channel)
            front.channel.close()

    def _fronts(self) -> list[Front]:
        return [key.data for key in list(self._selector.get_map().values()) if isinstance(key.data, Front)]

    # ---- requests

    def _add(self, front: Front, message: Add) -> None:
        """Queue a prompt; one with a grammar once that is compiled, which may take long and holds up nobody."""
        params = SamplingParams(**message.params)
        spec = params.structured_outputs
        if spec is None:
            self._queue(front, message, params, None)
            return
        front.compiling.add(message.handle)
        self._compiler.submit(lambda: self._grammar(spec), (front, message, params))

    def _hear_compiler(self) -> None:
        """Queue those whose grammars are compiled, and are still wanted."""
        for (front, message, params), outcome in self._compiler.results():
            if message.handle not in front.compiling:
                continue
            front.compiling.remove(message.handle)
            with self._losing(front):
                if isinstance(outcome, LlmkitError):
                    self._refuse(front, message, outcome)
                else:
                    self._queue(front, message, params, outcome)

    @staticmethod
    def _refuse(front: Front, message: Add, e: LlmkitError) -> None:
        handles = list(range(message.handle, message.handle + message.count))
        param = e.param if isinstance(e, InvalidRequestError) else None
        front.channel.send(Refused(handles, type(e).__name__, e.message, e.hint, param))

    def _queue(self, front: Front, message: Add, params: SamplingParams, grammar: Grammar | None) -> None:
        for i, request in enumerate(self._requests(message, params, grammar)):
            front.requests[message.handle + i] = request
            self._owners[request] = (front, message.handle + i)
            self._silent.add(request)
            self._engine.add(request)

    @staticmethod
    def _requests(message: Add, params: SamplingParams, grammar: Grammar | None) -> list[Request]:
        """The n requests of a prompt, of which the others are forks of the first."""
        prompt = np.frombuffer(message.prompt, np.int32)
        requests: list[Request] = []
        for i in range(message.count):
            request = Request(
                id=f"{message.id}/{i}" if i else message.id, prompt=prompt, params=params, stop_ids=message.stop_ids,
                bad_words=message.bad_words, grammar=grammar.copy() if grammar else None, seed=message.seed + i,
                max_total=message.max_total, priority=message.priority, pooling=message.pooling,
                read_along=message.read_along, fork_of=requests[0] if requests else None,
            )  # fmt: skip
            request.metrics.arrival_time = message.arrival
            requests.append(request)
        return requests

    def _grammar(self, spec: StructuredOutputs) -> Grammar:
        from llmkit.engine.grammar import Grammar

        vocab_size = self._started.model_config.vocab_size
        return Grammar.compile(spec, self._started.tokenizer, vocab_size, self._eos_ids or None)

    def _end(self, requests: list[Request]) -> None:
        """End requests of which nobody wants to hear any more."""
        self._engine.abort(requests)
        for request in requests:
            self._forget(request)

    def _forget(self, request: Request) -> tuple[Front, int]:
        front, handle = self._owners.pop(request)
        self._silent.discard(request)
        del front.requests[handle]
        return front, handle

    # ---- steps

    def _step(self) -> None:
        try:
            output = self._engine.step()
        except Gone:  # the supervisor, to whom a sign of life was given within the step
            raise
        except Exception as cause:
            self._break(cause)
            return
        if output is not None:
            self._collect(output)

    def _collect(self, output: StepOutput) -> None:
        """Give every token to the front that waits for it."""
        owners, silent = self._owners, self._silent
        for request, token in zip(output.requests, output.token_ids.tolist()):
            front, handle = owners[request]
            if request in silent:
                silent.remove(request)
                front.begun.append(_begun(request, handle))
            if token < 0:
                continue
            if request.params.logprobs is not None:
                front.logprobs.append((len(front.handles), _candidates(request.logprobs.pop())))
            front.handles.append(handle)
            front.tokens.append(token)
        for request in output.finished:
            front, handle = self._forget(request)
            front.ended.append(_ended(request, handle))

    def _report(self) -> None:
        """One message to each front that this step concerns."""
        stats, busy = self._engine.stats(), self._engine.has_work
        for front in self._fronts():
            with self._losing(front):
                front.send_step(stats, busy)
                self._watch(front)

    def _break(self, cause: Exception) -> None:
        """A step failed: its requests end with an error and the engine begins anew, in a new process where CUDA is at fault."""
        traceback.print_exc()
        error = EngineUnavailableError(f"the step that computed this request failed: {type(cause).__name__}: {cause}",
                                       "ask again: the engine has begun anew")  # fmt: skip
        for front in self._fronts():
            with self._losing(front):
                if front.requests:
                    front.channel.send(Refused(list(front.requests), type(error).__name__, error.message, error.hint))
                front.requests.clear()
        self._owners.clear()
        self._silent.clear()
        if "CUDA error" in str(cause):
            sys.exit(1)
        self._engine.recover()


def _no_text(token: int) -> str:
    return ""


def _candidates(entry: dict[int, Logprob]) -> list[tuple[int, float, int | None]]:
    return [(token, p.logprob, p.rank) for token, p in entry.items()]


def _begun(request: Request, handle: int) -> Begun:
    wanted = request.prompt_logprobs if request.params.prompt_logprobs is not None else None
    prompt = None if wanted is None else [None if entry is None else _candidates(entry) for entry in wanted]
    m = request.metrics
    return Begun(handle, request.num_cached, m.scheduled_time, m.first_token_time, prompt)


def _ended(request: Request, handle: int) -> Ended:
    m, vector = request.metrics, request.embedding
    return Ended(handle, request.finish_reason, request.stop_reason, m.finished_time, m.num_preemptions,
                 None if vector is None else np.asarray(vector, np.float32).tobytes())  # fmt: skip


# ---- the process


def main() -> None:
    """`python -m llmkit.server.processes.engine_process FD`: FD is the socket to the supervisor."""
    begin = time.perf_counter()
    when_stdin_closes(lambda: os._exit(0))
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the supervisor decides what they mean
        signal.signal(number, signal.SIG_IGN)
    faulthandler.register(SAY_WHERE, all_threads=True)
    control = Channel(socket.socket(fileno=int(sys.argv[1])))
    try:
        _start_and_run(control, begin)
    except Gone:
        sys.exit(0)


def _start_and_run(control: Channel, begin: float) -> None:
    """Until Gone says that the supervisor is; a failed start exits with 1."""
    try:
        with nothing_is_garbage():
            server = _start(control, begin)
    except LlmkitError as e:
        control.send(Failed(type(e).__name__, e.message, e.hint))
        sys.exit(1)
    except Gone:
        raise
    except Exception as e:
        traceback.print_exc()
        control.send(Failed("EngineError", f"the engine could not start: {type(e).__name__}: {e}", "the log has its traceback"))
        sys.exit(1)
    spare_what_is_there()
    server.run()


def _start(control: Channel, begin: float) -> EngineServer:
    control.send(Stage("import torch", {}))
    from llmkit.engine.start import StartupReport, start_engine

    class Announced(StartupReport):
        """Tells the supervisor of each stage."""

        @contextmanager
        def stage(self, name: str) -> Iterator[None]:
            control.send(Stage(name, dict(self.stages)))
            with super().stage(name):
                yield

    report = Announced({"import torch": time.perf_counter() - begin})
    order = _wait_for_start(control)
    started = start_engine(EngineConfig(**order.config), report)
    from llmkit.prompts import rules_of

    rules = rules_of(started)
    server = EngineServer(started, rules.eos_ids, control, order.alive_every)
    started.engine.model.layers = server.pulse.at_each(started.engine.model.layers)
    control.send(Ready(_facts(started, order.name), dataclasses.asdict(rules), _info(started)))
    return server


def _wait_for_start(control: Channel) -> Start:
    """The supervisor's order, which comes while torch is imported."""
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        while True:
            selector.select()
            for message in control.receive():
                if isinstance(message, Start):
                    return message


def _facts(started: Started, name: str) -> dict[str, Any]:
    engine, model = started.engine, started.model_config
    return {
        "model": name, "folder": str(started.folder), "max_model_len": engine.plan.max_model_len,
        "max_num_seqs": engine.plan.max_num_seqs, "vocab_size": model.vocab_size, "hidden_size": model.hidden_size,
        "dtype": str(engine.model.embedding.weight.dtype).removeprefix("torch."),
        "runs_on": started.report.facts["runs on"], "defaults": started.generation_config,
        "kv_cache_dtype": started.config.kv_cache_dtype,
    }  # fmt: skip


def _info(started: Started) -> dict[str, Any]:
    return {
        "engine_pid": os.getpid(), "stages": dict(started.report.stages), "notes": list(started.engine.plan.notes),
        "kv_tokens": started.engine.plan.kv_tokens, "memory_plan": str(started.engine.plan),
    }  # fmt: skip


if __name__ == "__main__":
    main()
