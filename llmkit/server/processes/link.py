"""The engine, as a front sees it: `EngineClient` over a socket to the engine's process.

Text is made here: the front builds requests, the engine turns them into tokens, the front turns these into text and finds stop
strings. Nothing waits for a slow reader: what he has not read yet is one piece, growing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

import numpy as np

from llmkit import errors
from llmkit.embedding import EmbeddingJob, check_pooling
from llmkit.engine.request import Request, Status
from llmkit.errors import EngineUnavailableError, LlmkitError, QueueFullError
from llmkit.job import Answer, Job
from llmkit.outputs import Logprob, RequestOutput, StreamChunk
from llmkit.prompts import RequestBuilder, Rules
from llmkit.sampling_params import SamplingParams
from llmkit.server.engine_client import EngineFacts, TokenPrompt
from llmkit.server.processes.wire import Add, Begun, Channel, End, Ended, Gone, Ready, Refused, Step
from llmkit.tokenizer import Tokenizer


class Waiter:
    """One task that waits for news."""

    def __init__(self) -> None:
        self._news = asyncio.Event()

    def wake(self) -> None:
        self._news.set()

    async def wait(self) -> None:
        await self._news.wait()
        self._news.clear()


class OpenJob(Job):
    """A job whose reader comes when he can. What he finds then is one piece an answer, however many tokens came since."""

    def __init__(self, prompt: str | None, requests: list[Request], tokenizer: Tokenizer, streaming: bool) -> None:
        super().__init__(prompt, requests, tokenizer, streaming)
        self.waiter = Waiter()
        self._unread: dict[Answer, None] = {}

    def _send(self, answer: Answer) -> None:
        self._unread[answer] = None
        self.waiter.wake()

    @property
    def all_read(self) -> bool:
        return self.finished and not self._unread

    def read(self) -> list[StreamChunk]:
        """What is new."""
        pieces = [self.piece(answer) for answer in self._unread]
        self._unread.clear()
        return pieces


class OpenEmbedding(EmbeddingJob):
    """An embedding that somebody waits for."""

    def __init__(self, prompt: str | None, request: Request, normalize: bool) -> None:
        super().__init__(prompt, request, normalize)
        self.waiter = Waiter()
        self.notify = self.waiter.wake


AnyJob = OpenJob | OpenEmbedding


class EngineLink:
    """An `EngineClient` for one event loop. It outlives engines: `connect` gives it the next one.

    max_open: requests on their way beyond which the next is refused with QueueFullError. number of count: which front this is, so
    that two of them never give two requests the same seed. stage: what the start is at, None when it is over.
    """

    def __init__(self, max_open: int | None = None, number: int = 0, count: int = 1) -> None:
        self._max_open, self._number, self._count = max_open, number, count
        self.stage: str | None = "import"
        self.info: dict[str, Any] = {}
        self._tokenizer: Tokenizer | None = None
        self._early: tuple[Channel, Ready] | None = None  # an engine that came before the tokenizer
        self._facts: EngineFacts | None = None
        self._builder: RequestBuilder | None = None
        self._channel: Channel | None = None
        self.why = "it is starting"
        self._handles = itertools.count(1)
        self._jobs: dict[int, tuple[AnyJob, Request]] = {}
        self._by_job: dict[AnyJob, list[int]] = {}
        self._stats: dict[str, Any] = {}

    # ---- what endpoints ask

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise self._unavailable()
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        if self._early is not None:
            self.connect(*self._early)

    @property
    def facts(self) -> EngineFacts:
        if self._facts is None:
            raise self._unavailable()
        return self._facts

    @property
    def healthy(self) -> bool:
        return self._channel is not None

    @property
    def num_open(self) -> int:
        """Prompts on their way."""
        return len(self._by_job)

    def stats(self) -> dict[str, Any]:
        return dict(self._stats)

    async def stream(
        self, prompt: TokenPrompt, params: SamplingParams, *, request_id: str, priority: int = 0
    ) -> AsyncIterator[StreamChunk]:
        job = self._open(prompt, params, request_id, priority, streaming=True)
        try:
            while not job.all_read:
                await job.waiter.wait()
                _raise_error(job)
                for piece in job.read():
                    yield piece
        finally:
            self._leave(job)

    async def generate(self, prompt: TokenPrompt, params: SamplingParams, *, request_id: str, priority: int = 0) -> RequestOutput:
        job = self._open(prompt, params, request_id, priority, streaming=False)
        await self._wait([job])
        return job.output()

    async def embed(self, prompts: list[TokenPrompt], pooling: str = "last", normalize: bool = True) -> list[list[float]]:
        check_pooling(pooling)
        builder = self._ready_builder(len(prompts))
        built = builder.build_pooled([_as_dict(p) for p in prompts], pooling)
        jobs = [OpenEmbedding(text, request, normalize) for text, request in built]
        for job in jobs:
            self._submit(job)
        await self._wait(jobs)
        return [job.output().embedding.tolist() for job in jobs]

    async def _wait(self, jobs: list[Any]) -> None:
        """Until all have ended; an error of one is raised, and ends the others."""
        try:
            for job in jobs:
                while not job.finished:
                    await job.waiter.wait()
                _raise_error(job)
        finally:
            for job in jobs:
                self._leave(job)

    # ---- asking the engine

    def _open(self, prompt: TokenPrompt, params: SamplingParams, request_id: str, priority: int, streaming: bool) -> OpenJob:
        builder = self._ready_builder(1)
        ((text, requests),) = builder.build([_as_dict(prompt)], params, priority, read_along=streaming)
        for i, request in enumerate(requests):
            request.id = f"{request_id}/{i}" if i else request_id
        job = OpenJob(text, requests, self.tokenizer, streaming)
        self._submit(job)
        return job

    def _ready_builder(self, more: int) -> RequestBuilder:
        """What makes requests; refuses when no engine is there, or too many requests are."""
        if self._builder is None or self._channel is None:
            raise self._unavailable()
        if self._max_open is not None and len(self._by_job) + more > self._max_open:
            raise QueueFullError(f"{len(self._by_job)} requests are on their way, and this server takes {self._max_open} at once",
                                 "ask again later")  # fmt: skip
        return self._builder

    def _unavailable(self) -> EngineUnavailableError:
        return EngineUnavailableError(f"the engine cannot answer now: {self.why}", "ask again in a few seconds")

    def _submit(self, job: AnyJob) -> None:
        handles = [next(self._handles) for _ in job.requests]
        self._by_job[job] = handles
        self._jobs |= {h: (job, r) for h, r in zip(handles, job.requests)}
        first = job.requests[0]
        self._send(
            Add(handles[0], len(handles), first.id, first.prompt.tobytes(), plain_params(first.params), first.stop_ids,
                first.bad_words, first.seed, first.max_total, first.priority, first.metrics.arrival_time, first.pooling,
                first.read_along)
        )  # fmt: skip

    def _leave(self, job: AnyJob) -> None:
        """Nobody waits for this job any more."""
        handles = [h for h in self._by_job.pop(job, ()) if self._jobs.pop(h, None)]
        if handles:
            self._send(End(handles))

    def _send(self, message: Add | End) -> None:
        if self._channel is None:
            return
        try:
            self._channel.send(message)
        except Gone:
            self.disconnect("it died")
            return
        if self._channel.full:
            asyncio.get_running_loop().add_writer(self._channel, self._flush)

    def _flush(self) -> None:
        if self._channel is None:
            return
        try:
            self._channel.flush()
        except Gone:
            self.disconnect("it died")
            return
        if not self._channel.full:
            asyncio.get_running_loop().remove_writer(self._channel)

    # ---- engines come and go

    def connect(self, channel: Channel, ready: Ready) -> None:
        """A ready engine."""
        self.disconnect("another one takes its place")
        if self._tokenizer is None:
            self._early = (channel, ready)
            return
        rules = Rules(**{**ready.rules, "eos_ids": tuple(ready.rules["eos_ids"])})
        self._facts, self.info, self.stage = EngineFacts(**ready.facts), ready.info, None
        first = next(self._handles) * self._count + self._number  # beyond all numbers that were used before
        self._builder = RequestBuilder(self.tokenizer, rules, compiles=False, first_number=first, stride=self._count)
        self._channel = channel
        asyncio.get_running_loop().add_reader(channel, self._hear)

    def disconnect(self, why: str) -> None:
        """No engine from now on; who waits for it gets EngineUnavailableError."""
        self.why, self.stage = why, self.stage or "restart"
        self._early = None
        if self._channel is None:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._channel)
        loop.remove_writer(self._channel)
        self._channel.close()
        self._channel, self._stats = None, {}
        error = EngineUnavailableError(f"the engine ended under this request: {why}", "ask again in a few seconds")
        self.end_all(error)

    def end_all(self, error: LlmkitError | None = None) -> None:
        """End every request: with an error, or with what it has and finish_reason "abort"."""
        handles = list(self._jobs)
        for handle in handles:
            job, request = self._jobs.pop(handle)
            job.error = job.error or error
            _finish(job, request, "abort")
        if handles:
            self._send(End(handles))

    # ---- what the engine says

    def _hear(self) -> None:
        if self._channel is None:
            return
        try:
            messages = self._channel.receive()
        except Gone:
            self.disconnect("it died")
            return
        for message in messages:
            if isinstance(message, Step):
                self._take(message)
            elif isinstance(message, Refused):
                self._refuse(message)

    def _take(self, step: Step) -> None:
        self._stats = step.stats
        for begun in step.begun:
            self._begin(begun)
        handles = np.frombuffer(step.handles, np.int32).tolist()
        for i, candidates in step.logprobs:
            if known := self._jobs.get(handles[i]):
                known[1].logprobs.append(self._named(candidates))
        ending = {e.handle: e for e in step.ended}
        stopped: list[int] = []
        for handle, token in zip(handles, np.frombuffer(step.tokens, np.int32).tolist()):
            known = self._jobs.get(handle)
            if known is not None and isinstance(known[0], OpenJob):
                job, request = known
                if handle in ending:
                    _mark(request, ending[handle])
                if job.take(request, token):
                    stopped.append(handle)
        for ended in step.ended:
            self._close(ended)
        if stopped:
            self._stop(stopped)

    def _begin(self, begun: Begun) -> None:
        known = self._jobs.get(begun.handle)
        if known is None:
            return
        request = known[1]
        request.num_cached = begun.num_cached
        request.metrics.scheduled_time, request.metrics.first_token_time = begun.scheduled, begun.first_token
        if begun.prompt_logprobs is not None:
            request.prompt_logprobs = [None if entry is None else self._named(entry) for entry in begun.prompt_logprobs]

    def _close(self, ended: Ended) -> None:
        known = self._jobs.pop(ended.handle, None)
        if known is None:
            return
        job, request = known
        _mark(request, ended)
        if ended.vector is not None:
            request.embedding = np.frombuffer(ended.vector, np.float32)
        job.close(request)

    def _stop(self, handles: Iterable[int]) -> None:
        """A stop string was found: the engine need not go on."""
        for handle in handles:
            if known := self._jobs.pop(handle, None):
                known[1].metrics.finished_time = time.monotonic()
                _finish(*known, "stop")
        self._send(End(list(handles)))

    def _refuse(self, refused: Refused) -> None:
        kind = getattr(errors, refused.kind, LlmkitError)
        extra = {"param": refused.param} if refused.param else {}
        error = kind(refused.message, refused.hint, **extra)
        for handle in refused.handles:
            if known := self._jobs.pop(handle, None):
                known[0].error = error
                _finish(*known, "abort")

    def _named(self, candidates: list[tuple[int, float, int | None]]) -> dict[int, Logprob]:
        return {token: Logprob(logprob, rank, self.tokenizer.token_text(token)) for token, logprob, rank in candidates}


def plain_params(params: SamplingParams) -> dict[str, Any]:
    """What differs from SamplingParams(), as plain data."""
    given = {f.name: getattr(params, f.name) for f in dataclasses.fields(params)}
    plain = {name: value for name, value in given.items() if value != _DEFAULTS[name]}
    if params.structured_outputs is not None:
        spec = params.structured_outputs
        fields = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
        plain["structured_outputs"] = {name: value for name, value in fields.items() if value not in (None, False)}
    return plain


_PLAIN = SamplingParams()
_DEFAULTS = {f.name: getattr(_PLAIN, f.name) for f in dataclasses.fields(_PLAIN)}


def _as_dict(prompt: TokenPrompt) -> dict[str, Any]:
    return {"prompt_token_ids": prompt.ids, "prompt": prompt.text}


def _mark(request: Request, ended: Ended) -> None:
    request.status, request.finish_reason, request.stop_reason = Status.FINISHED, ended.reason, ended.stop_reason
    request.metrics.finished_time, request.metrics.num_preemptions = ended.finished, ended.num_preemptions


def _finish(job: AnyJob, request: Request, reason: str) -> None:
    if not request.finished:
        request.status, request.finish_reason = Status.FINISHED, reason
    job.close(request)


def _raise_error(job: AnyJob) -> None:
    if job.error is not None:
        raise job.error
