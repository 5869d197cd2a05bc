"""`Timeline`: what a device did and when, span by span, and how long it had nothing to do.

On a GPU a span is a kernel or a copy as the device itself timed it, also inside a CUDA graph; on a CPU, an operator of torch
that was called by the step itself. This module is arithmetic over spans; `llmkit.profiling` records them.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmkit.errors import ConfigError, LlmkitError
from llmkit.kernel_names import short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from llmkit.llm import LLM, Params
    from llmkit.prompts import Prompt

KERNEL, COPY = "kernel", "copy"
_FORMAT = "llmkit timelines 1"
_LEVELS = " ▁▂▃▄▅▆▇█"


class Span(NamedTuple):
    """One piece of work. start, duration: µs since the first span of the recording. kind: "kernel" or "copy"."""

    start: float
    duration: float
    name: str
    kind: str = KERNEL

    @property
    def end(self) -> float:
        return self.start + self.duration


class Step(NamedTuple):
    """One step of the engine, from the end of the step before to the copy of its tokens to the host, in µs.
    tokens: computed in it; decodes: how many of them are the one token of a sequence that decodes."""

    start: float
    end: float
    tokens: int
    decodes: int

    @property
    def only_decodes(self) -> bool:
        return 0 < self.tokens == self.decodes


class Gap(NamedTuple):
    """A time in which nothing ran, in µs."""

    start: float
    duration: float


class Kernel(NamedTuple):
    """Everything of one name: how often, and µs in all. Where two overlap, the time is the one's that began first."""

    count: int
    total: float


@dataclass(frozen=True)
class Timeline:
    """What a device did during `llm.generate(...)`.

    graphs: whether decode steps were replayed from CUDA graphs. spans: by start. steps: in order. tokens: what each prompt was
    answered. plain_ms: ms of a decode step without a profiler, the median; None if not measured. capture_ms: batch size -> ms
    that its graph took to capture.
    """

    model: str
    device: str
    dtype: str
    graphs: bool
    spans: Sequence[Span]
    steps: Sequence[Step]
    tokens: Sequence[Sequence[int]] = ()
    plain_ms: float | None = None
    capture_ms: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def record(
        cls, llm: LLM, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, warm: bool = True
    ) -> Timeline:
        """Answer the prompts under torch's profiler. The tokens are those of `llm.generate`; `tokens` keeps them.

        warm: answer them once before without the profiler, so that kernels are compiled, graphs captured and the plain time of a
        step known. The prefix cache is forgotten before each of the two, so that both do the same work. Nobody else may use
        the engine meanwhile. LlmkitError when the profiler saw nothing.
        """
        from llmkit.profiling import record

        return record(llm, prompts, sampling_params, warm)

    # ---- how long

    @property
    def wall(self) -> float:
        """µs from the first span's beginning to the last one's end."""
        return max(s.end for s in self.spans) - self.spans[0].start if self.spans else 0.0

    @property
    def busy(self) -> float:
        """The share of that time in which something ran."""
        return sum(own for _, own, _ in self.without_overlap()) / self.wall if self.wall else 0.0

    @property
    def plain_busy(self) -> float | None:
        """The share of a step without the profiler that its kernels need, 1 at most: the profiler makes gaps of its own. For
        recordings of decode steps alone (`decode()`)."""
        return min(1.0, self.busy * self.per_step / self.plain_ms) if self.plain_ms else None

    @property
    def per_step(self) -> float:
        """ms a step, with the profiler looking on; `plain_ms` is without."""
        return self.wall / 1e3 / len(self.steps) if self.steps else 0.0

    @property
    def gaps(self) -> list[Gap]:
        """The times in which nothing ran, in order."""
        return [Gap(span.start - idle, idle) for span, _, idle in self.without_overlap() if idle > 0]

    def by_kernel(self) -> dict[str, Kernel]:
        """Short name -> how often and how long, the longest first. The times add up to the busy time."""
        found: dict[str, Kernel] = {}
        for span, own, _ in self.without_overlap():
            name = short_name(span.name)
            count, total = found.get(name, (0, 0.0))
            found[name] = Kernel(count + 1, total + own)
        return dict(sorted(found.items(), key=lambda item: -item[1].total))

    def without_overlap(self) -> Iterator[tuple[Span, float, float]]:
        """Each span, the µs that no earlier one covers, and the µs before it in which nothing ran."""
        until = self.spans[0].start if self.spans else 0.0
        for span in self.spans:
            yield span, max(0.0, span.end - max(span.start, until)), max(0.0, span.start - until)
            until = max(until, span.end)

    # ---- parts

    def decode(self, first: int = 0, count: int | None = None) -> Timeline:
        """The longest run of steps in which everybody decodes; of these, `count` from number `first` on. Time begins anew.
        LlmkitError when there are none."""
        runs: list[list[Step]] = [[]]
        for step in self.steps:
            runs[-1].append(step) if step.only_decodes else runs.append([])
        steps = max(runs, key=len)[first:][:count]
        if not steps:
            raise LlmkitError(f"there are no decode steps from number {first} on in this recording of {len(self.steps)} steps",
                              "record longer answers: SamplingParams(max_tokens=...)")  # fmt: skip
        return self.between(steps[0].start, steps[-1].end)

    def between(self, start: float, end: float) -> Timeline:
        """What began in [start, end), in µs, and the steps that lie therein. Time begins anew at its first span."""
        spans = [s for s in self.spans if start <= s.start < end]
        zero = spans[0].start if spans else start
        steps = [s for s in self.steps if start <= s.start and s.end <= end]
        return replace(self, spans=[s._replace(start=s.start - zero) for s in spans],
                       steps=[s._replace(start=s.start - zero, end=s.end - zero) for s in steps])  # fmt: skip

    # ---- keeping

    def save(self, path: str | Path) -> None:
        """Write JSON, compressed if the name ends in .gz; `load` reads it. Times are kept to the nanosecond."""
        save_timelines({"": self}, path)

    @classmethod
    def load(cls, path: str | Path) -> Timeline:
        """What `save` wrote. ConfigError when the file is something else."""
        found = load_timelines(path)
        if len(found) != 1:
            raise ConfigError(f"{Path(path).name} holds {len(found)} timelines: {', '.join(found)}",
                              "read them with llmkit.timeline.load_timelines")  # fmt: skip
        return next(iter(found.values()))

    # ---- looking

    @property
    def title(self) -> str:
        how = "" if self.device == "cpu" else ", CUDA graphs" if self.graphs else ", no graphs"
        return f"{self.model} on {self.device}, {self.dtype}{how}"

    def __str__(self) -> str:
        """For a terminal: how full each of 80 equal times was, and the five biggest kernels."""
        summary = f"{len(self.spans):,} spans in {self.wall / 1e3:.2f} ms, busy {self.busy:.0%}"
        if self.steps:
            count, each = len(self.steps), len(self.spans) / len(self.steps)
            summary += f"; {count} step{'s' * (count > 1)} of {self.per_step:.2f} ms, {each:,.0f} spans each"
        kernels = list(self.by_kernel().items())[:5]
        lines = [f"  {k.total / 1e3:8.2f} ms  {k.count:6,} × {name}" for name, k in kernels]
        return "\n".join([self.title, summary, f"0 ms ▕{self._strip(80)}▏ {self.wall / 1e3:.2f} ms", *lines])

    __repr__ = __str__

    def _strip(self, width: int) -> str:
        """`width` characters, each as high as its time was full."""
        cell, full = self.wall / width or 1.0, [0.0] * (width + 1)
        for span, own, _ in self.without_overlap():
            at = span.end - self.spans[0].start - own
            while own > 1e-9:
                here = min(width, int(at / cell))
                part = min(own, (here + 1) * cell - at) if here < width else own
                full[here] += part
                at, own = at + max(part, 1e-9), own - max(part, 1e-9)
        return "".join(_LEVELS[min(8, round(8 * f / cell))] for f in full[:width])

    def plot(self, ax: Axes, ms: float | None = None, title: str | None = None) -> None:
        """Draw the first `ms` milliseconds (default: all): coloured by what each kernel does; where nothing ran, nothing."""
        from llmkit.notebook.timeline_plots import plot_timeline

        plot_timeline(ax, self, ms, title)

    def _repr_mimebundle_(self, **options: Any) -> dict[str, str]:
        """A picture of the first milliseconds where matplotlib is there, and text everywhere."""
        data = {"text/plain": str(self)}
        try:
            from llmkit.notebook.timeline_plots import timeline_svg
        except ImportError:
            return data
        return data | {"image/svg+xml": timeline_svg(self)}


# ---- files


def save_timelines(timelines: Mapping[str, Timeline], path: str | Path) -> None:
    """Write several timelines by name into one file: JSON, compressed if the name ends in .gz."""
    kept = {"format": _FORMAT, "timelines": {name: _pack(t) for name, t in timelines.items()}}
    data = json.dumps(kept, separators=(",", ":"), ensure_ascii=False).encode()
    Path(path).write_bytes(gzip.compress(data, 9, mtime=0) if str(path).endswith(".gz") else data)


def load_timelines(path: str | Path) -> dict[str, Timeline]:
    """What `save_timelines` wrote, by name. ConfigError when the file is something else."""
    data = Path(path).read_bytes()
    try:
        kept = json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
        if kept["format"] != _FORMAT:
            raise ValueError(f"format {kept['format']!r}")
        return {name: _unpack(t) for name, t in kept["timelines"].items()}
    except (ValueError, KeyError, TypeError, EOFError, OSError) as error:
        raise ConfigError(f"{Path(path).name} is no timeline: {error}", "give a file that Timeline.save wrote") from error


def _pack(t: Timeline) -> dict[str, Any]:
    """Columns of whole ns: small numbers that compress well. starts: each since the one before."""
    starts = [round(1e3 * s.start) for s in t.spans]
    names = list(dict.fromkeys((s.name, s.kind) for s in t.spans))
    index = {name: i for i, name in enumerate(names)}
    return {
        "model": t.model, "device": t.device, "dtype": t.dtype, "graphs": t.graphs, "plain_ms": t.plain_ms,
        "capture_ms": {str(size): ms for size, ms in t.capture_ms.items()}, "tokens": [list(ids) for ids in t.tokens],
        "steps": [[round(1e3 * s.start), round(1e3 * s.end), s.tokens, s.decodes] for s in t.steps], "names": names,
        "name": [index[s.name, s.kind] for s in t.spans], "start": [b - a for a, b in zip([0, *starts], starts)],
        "duration": [round(1e3 * s.duration) for s in t.spans],
    }  # fmt: skip


def _unpack(kept: dict[str, Any]) -> Timeline:
    spans: list[Span] = []
    now = 0
    for name, since, duration in zip(kept["name"], kept["start"], kept["duration"], strict=True):
        now += since
        spans.append(Span(now / 1e3, duration / 1e3, *kept["names"][name]))
    steps = [Step(start / 1e3, end / 1e3, tokens, decodes) for start, end, tokens, decodes in kept["steps"]]
    captures = {int(size): ms for size, ms in kept["capture_ms"].items()}
    return Timeline(kept["model"], kept["device"], kept["dtype"], kept["graphs"], spans, steps, kept["tokens"],
                    kept["plain_ms"], captures)  # fmt: skip
