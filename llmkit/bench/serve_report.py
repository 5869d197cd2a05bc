"""What `llmkit bench serve` shows: a block a load, JSON with every request, a row for RESULTS.md, a picture."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import llmkit
from llmkit.bench.load import Run
from llmkit.bench.serve import LATENCIES, Summary, percentile, samples, summarize

COLUMNS = ("mean", "p50", "p90", "p99")


@dataclass
class ServeReport:
    """work: what was asked. runs_on: the server's device, as it says itself, or "a server elsewhere". options: of the command.
    busy: why the figures are not to be trusted, whatever they are."""

    model: str
    work: str
    runs_on: str
    runs: list[Run]
    options: dict[str, Any] = field(default_factory=dict)
    busy: list[str] = field(default_factory=list)
    summaries: list[Summary] = field(init=False)

    def __post_init__(self) -> None:
        self.summaries = [summarize(run) for run in self.runs]

    @property
    def warnings(self) -> list[str]:
        return [*self.busy, *(w for s in self.summaries for w in s.warnings)]

    def text(self) -> str:
        """For the terminal."""
        head = f"llmkit bench serve · {self.model} · {self.runs_on}\n{self.work}"
        return "\n".join([head, *(f"\n{_block(s)}" for s in self.summaries), *(f"warning: {w}" for w in self.warnings)])

    def markdown(self) -> str:
        """Rows for RESULTS.md."""
        return "\n".join(map(self._row, self.summaries))

    def _row(self, s: Summary) -> str:
        what = f"serve: {self.model}, {self.work}, {s.load}, llmkit {llmkit.__version__}"
        parts = [f"out tok/s {s.output_per_s:,.1f}; req/s {s.requests_per_s:.2f}"]
        parts += [f"{LATENCIES[n]} p50 {v['p50']:,.1f} p99 {v['p99']:,.1f} ms" for n, v in s.latencies.items()]
        return f"| {datetime.date.today().isoformat()} | {self.runs_on} | {what} | {'; '.join(parts)} | – |"

    def json(self) -> str:
        """Everything, every request included."""
        loads = [asdict(s) | {"samples": samples(run)} for s, run in zip(self.summaries, self.runs)]
        head = {"bench": "serve", "llmkit": llmkit.__version__, "date": datetime.date.today().isoformat(), "model": self.model,
                "runs_on": self.runs_on, "work": self.work, "options": self.options}  # fmt: skip
        return json.dumps(head | {"loads": loads, "warnings": self.warnings}, indent=1, ensure_ascii=False)

    def plot(self, path: Path) -> None:
        """One load: how its latencies spread. Several: latency over throughput."""
        from matplotlib import pyplot as plt

        from llmkit.notebook.plots import canvas

        if len(self.runs) == 1:
            _spread(canvas(2, height=3.2), self.runs[0])
        else:
            _curve(canvas(2, height=3.2), self.summaries)
        plt.gcf().suptitle(f"{self.model} · {self.work}", fontsize=10)
        plt.savefig(path, dpi=150)
        plt.close()


def _block(s: Summary) -> str:
    lines = [f"{s.load}: {s.requests - s.failed} of {s.requests} answered in {s.seconds:.2f} s, {s.in_flight:.1f} in flight · "
             f"{s.requests_per_s:.2f} req/s · in {s.input_per_s:,.0f}, out {s.output_per_s:,.1f} tok/s · "
             f"the client used {s.client_cpu:.0%} of a core"]  # fmt: skip
    if s.latencies:
        lines.append("         " + "".join(f"{c:>12}" for c in COLUMNS))
    for name, figures in s.latencies.items():
        lines.append(f"{LATENCIES[name]:>6} ms" + "".join(f"{figures[c]:>12,.2f}" for c in COLUMNS))
    return "\n".join(lines)


def _spread(axes: Any, run: Run) -> None:
    from llmkit.notebook.plots import BLUE, GREEN, ORANGE

    good = [o for o in run.outcomes if not o.error]
    lines = {"TTFT": ([o.ttft for o in good], BLUE, "-"), "E2E": ([o.e2e for o in good], GREEN, "--")}
    for name, (values, colour, style) in lines.items():
        axes[0].plot([1e3 * v for v in sorted(values)], _shares(len(values)), color=colour, ls=style, label=name)
    gaps = sorted(gap for o in good for gap in o.gaps)
    axes[1].plot([1e3 * g for g in gaps], _shares(len(gaps)), color=ORANGE, label="ITL")
    for ax, what in zip(axes, ("from when a request was due", "between pieces of an answer")):
        ax.set(xscale="log", xlabel=f"ms {what}", ylabel="share of all", ylim=(0, 1.02))
        _plain_numbers(ax.xaxis)
        ax.legend(frameon=False, fontsize=8)
    axes[0].set_title(f"{run.load}; p99 of TTFT {1e3 * percentile([o.ttft for o in good], 99):,.0f} ms", fontsize=9)


def _shares(count: int) -> list[float]:
    return [(i + 1) / count for i in range(count)]


def _curve(axes: Any, summaries: Sequence[Summary]) -> None:
    from llmkit.notebook.plots import BLUE, ORANGE

    speed = [s.output_per_s for s in summaries]
    for ax, name in zip(axes, ("ttft_ms", "tpot_ms")):
        for p, colour, style in (("p50", BLUE, "o-"), ("p99", ORANGE, "s--")):
            ax.plot(speed, [s.latencies.get(name, {}).get(p, float("nan")) for s in summaries], style, color=colour, label=p)
        for s in summaries:
            ax.annotate(s.load, (s.output_per_s, s.latencies.get(name, {}).get("p50", float("nan"))), fontsize=7,
                        xytext=(4, -9), textcoords="offset points")  # fmt: skip
        ax.set(yscale="log", xlabel="output tokens a second", ylabel=f"{LATENCIES[name]} ms")
        ax.margins(x=0.12, y=0.15)
        _plain_numbers(ax.yaxis)
        ax.legend(frameon=False, fontsize=8)


def _plain_numbers(axis: Any) -> None:
    """1, 2, 5, 10 on a logarithmic axis, not powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())
