"""What is shown: one line for the machine, its ceilings, a table; JSON with everything; a row for RESULTS.md."""

from __future__ import annotations

import datetime
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import llmkit
from llmkit.machine import cpu_name, num_cores

if TYPE_CHECKING:
    from llmkit.bench.ceilings import Ceilings

COLUMNS = {  # figure -> (title, format); the table has those that occur, in this order
    "seconds": ("s", ".2f"),
    "ready_s": ("ready s", ".2f"),
    "ttft_ms": ("TTFT ms", ".1f"),
    "tpot_ms": ("TPOT ms", ".2f"),
    "input_per_s": ("in tok/s", ",.0f"),
    "output_per_s": ("out tok/s", ",.1f"),
    "total_per_s": ("total tok/s", ",.0f"),
    "peak_rss_mb": ("peak RSS MB", ",.0f"),
    "spread": ("spread", ".0%"),
    "limit_s": ("limit s", ".2f"),
    "limit_ms": ("limit ms", ".2f"),
    "limit_share": ("of limit", ".1%"),
    "bandwidth_share": ("of read", ".1%"),
    "matmul_share": ("of matmul", ".1%"),
}
NOISY, DRIFT = 0.2, 1.05  # runs that differ by more; a share of the limit beyond what clocks explain


@dataclass
class Row:
    """One contender at one piece of work. figures: keys of COLUMNS, and `vs_NAME`: how many times as fast as NAME.
    samples: seconds of every run. stages: seconds by name, of a start."""

    work: str
    engine: str
    version: str
    figures: dict[str, float]
    samples: dict[str, list[float]]
    stages: dict[str, float] = field(default_factory=dict)


RANKED = (("tpot_ms", -1), ("input_per_s", 1), ("output_per_s", 1), ("seconds", -1))  # a ratio is of the first that a row has


def add_ratios(rows: list[Row]) -> None:
    """Give each row of llmkit `vs_NAME` for the others that did the same work; above 1, llmkit is the faster one."""
    for ours in rows:
        for theirs in rows:
            if ours.engine == "llmkit" and theirs.engine != "llmkit" and ours.work == theirs.work:
                name, sign = next((n, s) for n, s in RANKED if n in ours.figures)
                ours.figures[f"vs_{theirs.engine}"] = (ours.figures[name] / theirs.figures[name]) ** sign


@dataclass(frozen=True)
class Machine:
    """Where and with what: the line that every figure needs beside it."""

    cpu: str
    cores: int
    threads: int
    gpu: str | None
    versions: dict[str, str]
    date: str

    @classmethod
    def here(cls, threads: int, gpu: str | None, others: tuple[str, ...] = ()) -> Machine:
        """threads: torch's. others: distributions whose versions are named besides torch's."""
        versions = {"llmkit": llmkit.__version__, "python": platform.python_version()}
        versions |= {name: version(name) for name in ("torch", *others)}
        return cls(cpu_name(), num_cores(), threads, gpu, versions, datetime.date.today().isoformat())

    @property
    def device(self) -> str:
        """What the figures belong to: the GPU, or the CPU with its threads."""
        return self.gpu or f"{self.cpu}, {self.threads} of {self.cores} cores"

    def __str__(self) -> str:
        libraries = ", ".join(f"{name} {v}" for name, v in self.versions.items())
        return f"{self.cpu}, {self.cores} cores, {self.threads} torch threads, {self.gpu or 'no GPU'} · {libraries} · {self.date}"


@dataclass
class Report:
    """Everything of one run of `llmkit bench`. options: the arguments in force."""

    bench: str
    model: str
    dtype: str
    machine: Machine
    ceilings: Ceilings | None
    rows: list[Row]
    options: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def text(self) -> str:
        """For the terminal."""
        parts = [f"llmkit bench {self.bench} · {self.model} · {self.dtype}", str(self.machine)]
        parts += [str(self.ceilings)] if self.ceilings else []
        parts += ["", table(self.rows)]
        parts += ["", *(_stages(r) for r in self.rows if r.stages)] if any(r.stages for r in self.rows) else []
        return "\n".join(parts + [f"warning: {w}" for w in self.warnings])

    def markdown(self) -> str:
        """Rows for RESULTS.md: date, device, what, figure, share of limit."""
        return "\n".join(self._markdown_row(r) for r in self.rows)

    def _markdown_row(self, row: Row) -> str:
        what = f"{self.bench}: {self.model} {self.dtype}, {row.work}, {row.engine} {row.version}"
        shown = [f"{title} {f.format(row.figures[name])}" for name, title, f in _columns([row]) if not name.startswith("limit")]
        figure = "; ".join(shown)
        share = f"{row.figures['limit_share']:.0%}" if "limit_share" in row.figures else "–"
        return f"| {self.machine.date} | {self.machine.device} | {what} | {figure} | {share} |"

    def json(self) -> str:
        """Everything, samples included."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)


def table(rows: list[Row]) -> str:
    """Plain text: a row per contender and work, a column per figure."""
    columns = _columns(rows)
    lines = [["work", "engine", *(title for _, title, _ in columns)]]
    for row in rows:
        cells = [f.format(row.figures[name]) if name in row.figures else "" for name, _, f in columns]
        lines.append([row.work, row.engine, *cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(_align(cell, w, i) for i, (cell, w) in enumerate(zip(line, widths))).rstrip() for line in lines)


def _columns(rows: list[Row]) -> list[tuple[str, str, str]]:
    """(figure, title, format string) of what these rows have."""
    present = {name for row in rows for name in row.figures}
    known = [(name, title, f"{{:{f}}}") for name, (title, f) in COLUMNS.items() if name in present]
    return known + [(name, f"x {name[3:]}", "{:.2f}") for name in sorted(present) if name.startswith("vs_")]


def _align(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)


def _stages(row: Row) -> str:
    return f"{row.engine}: " + ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in row.stages.items())


def load_average() -> float:
    """Processes that wanted to run in the last minute; 0 where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def warnings(rows: list[Row], load_before: float, load_after: float, cores: int) -> list[str]:
    """Reasons not to trust the figures. The bench itself loads every core, so only what exceeds that by one tells afterwards."""
    found = []
    if load_before > cores or load_after > cores + 1:
        load = max(load_before, load_after)
        found.append(f"the machine is busy (load {load:.1f} on {cores} cores): figures are not to be trusted")
    for row in rows:
        if row.figures["spread"] > NOISY:
            found.append(f"{row.work}, {row.engine}: runs differ by {row.figures['spread']:.0%}")
        if row.figures.get("limit_share", 0) > DRIFT:
            found.append(f"{row.work}, {row.engine}: above the limit: the ceiling was measured too low, or a cache helped")
    return found
