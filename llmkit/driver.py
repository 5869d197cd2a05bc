"""One engine, many callers: threads that step it themselves, and async code, for which a thread of its own steps.

Who wants to change or step the engine takes its turn. Who must not wait for a step (an event loop) leaves mail, read at the
beginning of every turn.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

from llmkit.embedding import EmbeddingJob
from llmkit.engine.engine import Engine, StepOutput
from llmkit.engine.request import Request
from llmkit.engine.start import Started
from llmkit.errors import EngineClosedError, EngineError, LlmkitError
from llmkit.interrupt import interrupt_afterwards
from llmkit.job import Job

AnyJob = Job | EmbeddingJob


class FairLock:
    """A reentrant lock with two doors. A thread that leaves and comes back at once (the one that steps) finds the first door held
    by whoever waited, so it cannot keep the others out, as it would with a plain lock."""

    def __init__(self) -> None:
        self._gate, self._room = threading.Lock(), threading.Lock()
        self._owner, self._depth = 0, 0

    def __enter__(self) -> None:
        if self._owner != threading.get_ident():
            with self._gate:
                self._room.acquire()
            self._owner = threading.get_ident()
        self._depth += 1

    def __exit__(self, *exc: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = 0
            self._room.release()


_on_gpus: weakref.WeakSet[Driver] = weakref.WeakSet()  # that are open


class Driver:
    """Owns a started engine. Every method may be called from any thread; `submit` and `leave` never wait for a step."""

    def __init__(self, started: Started) -> None:
        self._started: Started | None = started
        self.closed = False
        self._lock = FairLock()
        self._jobs: dict[Request, AnyJob] = {}
        self._in_background: set[Request] = set()
        self._mail: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        if started.engine.model.device.type == "cuda":
            _on_gpus.add(self)

    @property
    def started(self) -> Started:
        """What was started; EngineClosedError once it is closed."""
        started = self._started
        if started is None or self.closed:
            raise _closed()
        return started

    @contextmanager
    def turn(self) -> Iterator[Engine]:
        """The engine, for this thread alone; an interrupt waits until the turn ends."""
        with interrupt_afterwards(), self._lock:
            engine = self.started.engine
            self._read_mail()
            yield engine

    def _read_mail(self) -> None:
        while self._mail:
            self._mail.popleft()()

    # ---- jobs

    def submit(self, jobs: Sequence[AnyJob], in_background: bool = False) -> None:
        """Queue jobs for the next step. in_background: a thread shall step them, for nobody else does."""
        self._mail.append(lambda: self._add(jobs, in_background))
        if self.closed:  # looked at after posting, and close() reads the mail after it is set: one of the two sees the other
            raise _closed()
        if in_background:
            self._start_thread()
            self._wake.set()

    def _add(self, jobs: Sequence[AnyJob], in_background: bool) -> None:
        for job in jobs:
            self._jobs |= dict.fromkeys(job.requests, job)
            if in_background:
                self._in_background.update(job.requests)
            for request in job.requests:
                self._engine.add(request)

    def leave(self, job: AnyJob) -> None:
        """End this job before the next step; nobody waits for it."""
        if not job.finished:
            self._mail.append(lambda: self._end([job]))
            self._wake.set()

    def abort(self, jobs: Sequence[AnyJob]) -> None:
        """End what still runs of these jobs; their blocks are free when this returns."""
        with interrupt_afterwards(), self._lock:
            if not self.closed:
                self._read_mail()
                self._end(jobs)

    @property
    def _engine(self) -> Engine:
        """The engine, which close() still needs when nobody else may have it."""
        if self._started is None:
            raise _closed()
        return self._started.engine

    def _end(self, jobs: Iterable[AnyJob], error: LlmkitError | None = None) -> None:
        running = [r for job in jobs for r in job.requests if not r.finished]
        self._engine.abort(running)
        self._settle(running, error)

    def _settle(self, requests: Iterable[Request], error: LlmkitError | None = None) -> None:
        """Close the books of requests that have ended."""
        for request in requests:
            self._in_background.discard(request)
            job = self._jobs.pop(request, None)
            if job is not None:
                job.error = job.error or error
                job.close(request)

    # ---- steps

    def step(self) -> StepOutput | None:
        """One engine step, whoever's requests it advances; None when there is nothing to do.

        If it breaks, everything that ran is ended with an EngineError, the engine begins anew, and the cause is raised here.
        """
        with self.turn() as engine:
            try:
                output = engine.step()
                if output is not None:
                    self._dispatch(engine, output)
            except BaseException as cause:
                try:
                    engine.recover()
                finally:  # even then nobody waits in vain
                    for request, job in list(self._jobs.items()):
                        self._settle([request], job.error or _broken(cause))
                raise
            return output

    def _dispatch(self, engine: Engine, output: StepOutput) -> None:
        for request, token in zip(output.requests, output.token_ids.tolist()):
            if token >= 0 and self._jobs[request].take(request, token):
                engine.stop(request)
                output.finished.append(request)
        self._settle(output.finished)

    def _start_thread(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="llmkit-steps", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        """Step as long as async code waits; ends when this is closed."""
        while not self.closed:
            self._wake.wait()
            self._wake.clear()
            while (self._in_background or self._mail) and not self.closed:
                try:
                    self.step()
                except Exception:  # every job has been given the error, and its reader raises it
                    continue

    # ---- ending

    def close(self) -> None:
        """End every job and let go of the engine. Closing twice is fine."""
        with interrupt_afterwards(), self._lock:
            if self.closed:
                return
            self.closed = True
            self._read_mail()
            self._end(set(self._jobs.values()), EngineClosedError("this LLM was closed while it answered"))
            self._started = None
        self._wake.set()
        gc.collect()
        _give_host_memory_back()
        if self in _on_gpus:
            _on_gpus.discard(self)
            _give_gpu_memory_back()


def _give_host_memory_back() -> None:
    """What was freed goes to the system: glibc keeps tensors of less than 32 MiB, which is most of a small model, for itself."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _give_gpu_memory_back() -> None:
    import torch

    from llmkit.whole_gpu import empty_cache

    if not _on_gpus:  # cuBLAS's workspaces, for the engines' streams: the graphs of others that are open write to theirs
        torch._C._cuda_clearCublasWorkspaces()
    empty_cache()


def _closed() -> EngineClosedError:
    return EngineClosedError("this LLM is closed", "make a new one: LLM(...)")


def _broken(cause: BaseException) -> EngineError:
    what = "was interrupted" if isinstance(cause, KeyboardInterrupt) else f"failed: {type(cause).__name__}: {cause}"
    error = EngineError(f"the step that computed this request {what}", "ask again: the engine has begun anew")
    error.__cause__ = cause
    return error
