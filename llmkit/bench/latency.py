"""Latency: time to first token, time per output token at each batch size, prefill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmkit.bench.contenders import Contender, check_length
from llmkit.bench.limits import Limits
from llmkit.bench.measure import median, rounds, spread, warm_up
from llmkit.bench.report import Row
from llmkit.bench.workload import Workload, fixed
from llmkit.errors import LlmkitError


@dataclass(frozen=True)
class LatencyPlan:
    """Decode at each of `batches`, input_len in and output_len (at least 2) out; prefill of one prompt of each of `prefills`."""

    batches: tuple[int, ...] = (1,)
    input_len: int = 128
    output_len: int = 128
    prefills: tuple[int, ...] = (512,)
    repeat: int = 3


def measure_latency(contenders: Sequence[Contender], plan: LatencyPlan, limits: Limits, vocab: int) -> list[Row]:
    """One row per contender and shape."""
    check_length(contenders, max(plan.input_len + plan.output_len, *(n + 1 for n in plan.prefills), 0))
    rows: list[Row] = []
    for batch in plan.batches:
        rows += _decode(contenders, fixed(batch, plan.input_len, plan.output_len), plan.repeat, limits, vocab)
    for length in plan.prefills:
        rows += _prefill(contenders, length, plan.repeat, limits, vocab)
    return rows


def _decode(contenders: Sequence[Contender], work: Workload, repeat: int, limits: Limits, vocab: int) -> list[Row]:
    """The time of a step is (time of all tokens - time of the first) / (tokens - 1): the same sum for every engine."""
    batch, length = len(work.output_lens), work.output_lens[0]
    warm_up(contenders, work, vocab)
    first = rounds(contenders, work.shortened(1), repeat, vocab, "first")
    whole = rounds(contenders, work, repeat, vocab, "whole")
    floor = decode_floor(work, limits)
    rows: list[Row] = []
    for c in contenders:
        steps = [(w - f) / (length - 1) for w, f in zip(whole[c.name], first[c.name])]
        step = median(steps)
        if step <= 0:
            raise LlmkitError(f"{length} tokens of {c.name} took no longer than one: the machine is too busy for so short a run",
                              "raise --output-len or --repeat")  # fmt: skip
        figures = {"ttft_ms": 1e3 * median(first[c.name]), "tpot_ms": 1e3 * step, "output_per_s": batch / step,
                   "limit_ms": 1e3 * floor, "limit_share": floor / step, "spread": spread(steps)}  # fmt: skip
        samples = {"first_s": first[c.name], "whole_s": whole[c.name]}
        rows.append(Row(f"decode, batch {batch} ({work.input_lens[0]} in, {length} out)", c.name, c.version, figures, samples))
    return rows


def decode_floor(work: Workload, limits: Limits) -> float:
    """Seconds of a decode step at the ceilings, the mean over the steps as the contexts grow."""
    batch, length = len(work.output_lens), work.output_lens[0]
    contexts = range(work.input_lens[0] + 1, work.input_lens[0] + length)
    return sum(limits.decode([c] * batch).seconds for c in contexts) / len(contexts)


def _prefill(contenders: Sequence[Contender], length: int, repeat: int, limits: Limits, vocab: int) -> list[Row]:
    work = fixed(1, length, 1)
    warm_up(contenders, work, vocab)
    seconds = rounds(contenders, work, repeat, vocab, "prefill")
    floor = limits.prefill(work.input_lens).seconds
    rows: list[Row] = []
    for c in contenders:
        taken = median(seconds[c.name])
        figures = {"ttft_ms": 1e3 * taken, "input_per_s": length / taken, "limit_ms": 1e3 * floor, "limit_share": floor / taken,
                   "spread": spread(seconds[c.name])}  # fmt: skip
        rows.append(Row(f"prefill {length}", c.name, c.version, figures, {"seconds": seconds[c.name]}))
    return rows
