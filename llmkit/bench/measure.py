"""Timing contenders side by side: the same tokens for each, in turn (A, B, A, B), so that what disturbs one disturbs all."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence

from llmkit.bench.contenders import Contender
from llmkit.bench.workload import Workload
from llmkit.errors import LlmkitError


def rounds(contenders: Sequence[Contender], work: Workload, repeat: int, vocab: int, seed: object) -> dict[str, list[float]]:
    """Seconds of each of `repeat` runs, by contender. Each round has tokens of its own, so that no prefix cache answers."""
    seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    for i in range(repeat):
        prompts = work.prompts(f"{seed}/{i}", vocab)
        for c in contenders:
            say(f"{work.name}: {c.name}, run {i + 1} of {repeat}")
            seconds[c.name].append(timed(c, prompts, work.output_lens))
    return seconds


def warm_up(contenders: Sequence[Contender], work: Workload, vocab: int) -> None:
    """The shapes to come, a few tokens long, with other tokens."""
    short = work.shortened(8)
    for c in contenders:
        say(f"{work.name}: {c.name}, warming up")
        timed(c, short.prompts("warm-up", vocab), short.output_lens)


def timed(contender: Contender, prompts: Sequence[list[int]], output_lens: Sequence[int]) -> float:
    """Seconds of one run. A contender that did not produce every token has no time worth comparing: LlmkitError."""
    begin = time.perf_counter()
    answers = contender.generate(prompts, output_lens)
    seconds = time.perf_counter() - begin
    got = [len(a) for a in answers]
    if got != list(output_lens):
        raise LlmkitError(f"{contender.name} produced {sum(got)} tokens where {sum(output_lens)} were asked for",
                          "its time would mean nothing; this is a bug in llmkit.bench or in the engine")  # fmt: skip
    return seconds


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float]) -> float:
    """(largest - smallest) / median: 0 when all runs agree."""
    return (max(values) - min(values)) / median(values) if values else 0.0


def say(text: str) -> None:
    """What is going on, in one line that replaces itself; nothing in a log file."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
