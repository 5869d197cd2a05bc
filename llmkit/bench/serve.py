"""What a load says of a server: latencies as percentiles, throughput, failures, and whether the client was the limit."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmkit.bench.load import Run

LATENCIES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_ms": "ITL", "e2e_ms": "E2E"}
PERCENTILES = (50, 90, 99)
BUSY, LATE = 0.7, 0.010  # share of a core, and seconds too late, from which the client may be what was measured


@dataclass
class Summary:
    """One load in figures. latencies: of those in LATENCIES, in ms: {"mean", "p50", "p90", "p99"}. in_flight: requests at once,
    the mean over the time. client_cpu: share of one core. late_ms: how late the client sent, p99. failures: why -> how many."""

    load: str
    requests: int
    failed: int
    seconds: float
    requests_per_s: float
    input_per_s: float
    output_per_s: float
    total_per_s: float
    in_flight: float
    client_cpu: float
    late_ms: float
    latencies: dict[str, dict[str, float]]
    failures: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def summarize(run: Run) -> Summary:
    """The figures of a run; latencies and tokens are those of the requests that were answered whole."""
    good = [o for o in run.outcomes if not o.error]
    failures = Counter(o.error for o in run.outcomes if o.error)
    seconds = max(run.seconds, 1e-9)
    tokens_in, tokens_out = sum(o.input_tokens for o in good), sum(o.output_tokens for o in good)
    samples = {
        "ttft_ms": [o.ttft for o in good],
        "tpot_ms": [o.tpot for o in good if o.tpot is not None],
        "itl_ms": [gap for o in good for gap in o.gaps],
        "e2e_ms": [o.e2e for o in good],
    }
    summary = Summary(
        load=str(run.load), requests=len(run.outcomes), failed=len(run.outcomes) - len(good), seconds=run.seconds,
        requests_per_s=len(good) / seconds, input_per_s=tokens_in / seconds, output_per_s=tokens_out / seconds,
        total_per_s=(tokens_in + tokens_out) / seconds, in_flight=sum(o.e2e for o in run.outcomes) / seconds,
        client_cpu=run.cpu / seconds, late_ms=1e3 * percentile([o.late for o in run.outcomes], 99),
        latencies={name: _figures(values) for name, values in samples.items() if values}, failures=dict(failures),
    )  # fmt: skip
    summary.warnings = _warnings(summary)
    return summary


def _figures(seconds: Sequence[float]) -> dict[str, float]:
    figures = {"mean": statistics.fmean(seconds)} | {f"p{p}": percentile(seconds, p) for p in PERCENTILES}
    return {name: 1e3 * value for name, value in figures.items()}


def percentile(values: Sequence[float], p: float) -> float:
    """Between the two nearest ranks, as numpy does."""
    if not values:
        return 0.0
    ordered, place = sorted(values), (len(values) - 1) * p / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _warnings(summary: Summary) -> list[str]:
    found: list[str] = []
    if summary.client_cpu > BUSY:
        found.append(f"{summary.load}: the client used {summary.client_cpu:.0%} of a core and may be the limit")
    if summary.late_ms > 1e3 * LATE:
        found.append(f"{summary.load}: one request in a hundred was sent {summary.late_ms:.0f} ms late or more, which is "
                     "part of its latency: the client's machine is too busy")  # fmt: skip
    found += [f"{summary.load}: {count} failed: {why}" for why, count in summary.failures.items()]
    return found


def samples(run: Run) -> list[dict[str, Any]]:
    """Every request, for the JSON."""
    return [{"due_s": round(o.due, 6), "late_ms": round(1e3 * o.late, 3), "ttft_ms": round(1e3 * o.ttft, 3),
             "e2e_ms": round(1e3 * o.e2e, 3), "input_tokens": o.input_tokens, "output_tokens": o.output_tokens,
             "itl_ms": [round(1e3 * gap, 3) for gap in o.gaps], "error": o.error or None} for o in run.outcomes]  # fmt: skip
