"""Records a `Timeline`: runs `LLM.generate` under torch's profiler and finds the engine's steps in what it saw."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from llmkit.errors import LlmkitError
from llmkit.timeline import COPY, KERNEL, Span, Step, Timeline

if TYPE_CHECKING:
    from llmkit.engine.engine import StepOutput
    from llmkit.llm import LLM

_MARK = "llmkit step"


@dataclass
class _Seen:
    """What the engine said of one step. at: seconds on the host's clock, when its tokens were there."""

    at: float
    tokens: int = 0
    decodes: int = 0
    sampled: bool = False

    @property
    def only_decodes(self) -> bool:
        return 0 < self.tokens == self.decodes


@dataclass
class _Watch:
    """Writes down every step of an engine. marked: make each step visible in a profile of the CPU."""

    marked: bool = False
    seen: list[_Seen] = field(default_factory=list)

    def around(self, step: Callable[[], StepOutput | None]) -> Callable[[], StepOutput | None]:
        def watched() -> StepOutput | None:
            with record_function(_MARK) if self.marked else nullcontext():
                output = step()
            now = time.perf_counter()
            batch = output.batch if output else None
            self.seen.append(_Seen(now, batch.num_tokens, batch.num_decodes, bool(batch.sampled.size)) if batch else _Seen(now))
            return output

        return watched

    def decode_ms(self) -> float | None:
        """The median time from one decode step's tokens to the next one's: a step that captured or compiled does not count."""
        found = [1e3 * (b.at - a.at) for a, b in pairwise(self.seen) if a.only_decodes and b.only_decodes]
        return statistics.median(found) if found else None


def record(llm: LLM, prompts: Any, sampling_params: Any = None, warm: bool = True) -> Timeline:
    """As `Timeline.record`."""
    runner = llm._engine.runner
    on_gpu = runner.device.type == "cuda"
    plain = _Watch()
    if warm:
        _generate(llm, prompts, sampling_params, plain)
    watch = _Watch(marked=not on_gpu)
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU  # not both: watching the host would slow it down
    with _quiet_profiler(), profile(activities=[activity], acc_events=True) as seen:
        tokens = _generate(llm, prompts, sampling_params, watch)
    events = list(seen.events() or ())
    spans, steps = _of_device(events, watch.seen) if on_gpu else _of_host(events, watch.seen)
    if not spans:
        raise LlmkitError(f"torch's profiler saw nothing on {runner.device}",
                          "it needs CUPTI, which comes with torch, and no other profiler at the same time")  # fmt: skip
    graphs = getattr(runner, "graphs", None)
    captured = {size: 1e3 * seconds for (size, _), seconds in graphs.capture_seconds.items()} if graphs else {}
    device = torch.cuda.get_device_name(runner.device) if on_gpu else "cpu"
    dtype = str(runner.model.dtype).removeprefix("torch.")
    zero = spans[0].start
    return Timeline(_model_name(llm), device, dtype, graphs is not None and not graphs.eager,
                    [s._replace(start=s.start - zero) for s in spans],
                    [s._replace(start=s.start - zero, end=s.end - zero) for s in steps],
                    tokens, plain.decode_ms(), captured)  # fmt: skip


def _generate(llm: LLM, prompts: Any, sampling_params: Any, watch: _Watch) -> list[list[int]]:
    """The answers' tokens; nothing is under way before and after."""
    llm.reset_prefix_cache()
    _drain(llm)
    with _watching(llm, watch):
        outputs = llm.generate(prompts, sampling_params, use_tqdm=False)
        _drain(llm)
    return [list(answer.token_ids) for output in outputs for answer in output.outputs]


def _drain(llm: LLM) -> None:
    """End a step that was launched ahead for requests that have ended since."""
    while llm._engine.has_work:
        llm._driver.step()


@contextmanager
def _watching(llm: LLM, watch: _Watch) -> Iterator[None]:
    with llm._driver.turn() as engine:
        engine.step = watch.around(engine.step)
    try:
        yield
    finally:
        del engine.step  # the method of the class is seen again


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Kineto writes to stderr when it starts and stops; how much, it asks the environment when it is first used."""
    unset = "KINETO_LOG_LEVEL" not in os.environ
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    try:
        yield
    finally:
        if unset:
            del os.environ["KINETO_LOG_LEVEL"]


def _model_name(llm: LLM) -> str:
    """As it was asked for; of a file or folder only its own name, for where it lies is nobody's business."""
    model = str(llm.config.model)
    return Path(model).name if Path(model).exists() else model


# ---- from events to spans and steps


def _of_device(events: Sequence[Any], seen: Sequence[_Seen]) -> tuple[list[Span], list[Step]]:
    """What ran on the GPU. Steps are told apart by the one copy to the host with which each that samples ends."""
    found = [e for e in events if e.device_type.name == "CUDA" and not getattr(e, "is_user_annotation", False)]
    spans = sorted(_span(e, COPY if e.name.startswith(("Memcpy", "Memset")) else KERNEL) for e in found)
    sampled: list[_Seen] = []
    waiting = 0  # tokens of steps that sampled nothing: no copy tells where they ended
    for step in seen:
        waiting += step.tokens
        if step.sampled:
            sampled.append(_Seen(step.at, waiting, step.decodes, True))
            waiting = 0
    copies = _token_copies(spans, len(sampled))
    starts = [spans[0].start, *(c.end for c in copies)] if spans else []
    # from the end: if the profiler missed something, it was the beginning
    return spans, [Step(start, copy.end, s.tokens, s.decodes)
                   for start, copy, s in zip(starts, copies, sampled[-len(copies) :] if copies else [])]  # fmt: skip


def _token_copies(spans: Sequence[Span], steps: int) -> list[Span]:
    """The copies that bring each step's tokens to the host: of the kinds of copy that go there, the one as frequent as steps."""
    by_name: dict[str, list[Span]] = {}
    for span in spans:
        if span.name.startswith("Memcpy DtoH"):
            by_name.setdefault(span.name, []).append(span)
    nearest = min(by_name.values(), key=lambda copies: abs(len(copies) - steps), default=[])
    return nearest[max(0, len(nearest) - steps) :]


def _of_host(events: Sequence[Any], seen: Sequence[_Seen]) -> tuple[list[Span], list[Step]]:
    """The operators that steps called themselves, without those that these call in turn."""
    marks = [e for e in events if e.name == _MARK]
    inside = {id(e) for e in marks}
    spans = sorted(_span(e, KERNEL) for e in events if e.cpu_parent is not None and id(e.cpu_parent) in inside)
    steps = [Step(m.time_range.start, m.time_range.end, s.tokens, s.decodes) for m, s in zip(marks, seen, strict=True)]
    return spans, [s for s in steps if s.tokens]


def _span(event: Any, kind: str) -> Span:
    """µs since the profiler began."""
    return Span(event.time_range.start, event.time_range.end - event.time_range.start, event.name, kind)
