"""Throughput: many requests at once, tokens a second, and how near that is to the machine's limits."""

from __future__ import annotations

from collections.abc import Sequence

from llmkit.bench.contenders import Contender, check_length
from llmkit.bench.limits import Limits
from llmkit.bench.measure import median, rounds, spread, warm_up
from llmkit.bench.report import Row
from llmkit.bench.workload import Workload


def measure_throughput(
    contenders: Sequence[Contender], work: Workload, repeat: int, limits: Limits, vocab: int
) -> list[Row]:
    """One row per contender. All are held to one limit: that of the first, with as many requests at once as it takes."""
    check_length(contenders, work.longest)
    warm_up(contenders, work, vocab)
    seconds = rounds(contenders, work, repeat, vocab, "throughput")
    need = limits.workload(work, contenders[0].max_num_seqs)
    rows: list[Row] = []
    for c in contenders:
        taken = median(seconds[c.name])
        figures = {
            "seconds": taken,
            "output_per_s": work.num_output / taken,
            "total_per_s": (work.num_input + work.num_output) / taken,
            "limit_s": need.seconds,
            "limit_share": need.seconds / taken,
            "matmul_share": need.flops / limits.flops / taken,
            "bandwidth_share": need.bytes / limits.bandwidth / taken,
            "spread": spread(seconds[c.name]),
        }
        rows.append(Row(work.name, c.name, c.version, figures, {"seconds": seconds[c.name]}))
    return rows
