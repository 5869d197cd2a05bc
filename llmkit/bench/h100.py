"""`llmkit bench --suite h100`: the rows by which engines on one H100 are compared, with vLLM 0.26's figures and ours to reach.

A is Qwen2-7B-Instruct's shape, B is Qwen3-0.6B's; weights are random, prompts are token ids, so nothing is downloaded. The
method, the same for every engine: temperature 0.6, no end before the last token, no text made; a row is warmed up once by work of
the same shape with other tokens, then measured `repeat` times, and the median counts. Decode: (256 tokens' time - one's) / 255.
The measurements are here; `suite` runs them.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmkit.bench.row_names import pick_rows
from llmkit.bench.workload import VOCAB, Workload, fixed, nano, sharegpt, tokens
from llmkit.errors import LlmkitError

if TYPE_CHECKING:
    from llmkit.bench.engines import Loaded
    from llmkit.bench.limits import Limits

MODELS: dict[str, dict[str, Any]] = {
    "A": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
        "max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "hidden_act": "silu", "torch_dtype": "bfloat16",
    },
    "B": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936,
        "max_position_embeddings": 40960, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "hidden_act": "silu", "torch_dtype": "bfloat16",
    },
}  # fmt: skip
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 128, "vocab_size": 500}  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """How much of the work is done: `full`, or `tiny`, which only shows that every row can be measured."""

    model: dict[str, Any]
    count: Callable[[int], int]
    length: Callable[[int], int]
    context: Callable[[int], int]

    def config(self, name: str) -> dict[str, Any]:
        return MODELS[name] | self.model

    def work(self, work: Workload) -> Workload:
        """As much of a workload as is to be done."""
        count = self.count(len(work.input_lens))
        return Workload(work.name, tuple(map(self.length, work.input_lens[:count])),
                        tuple(max(2, self.length(n)) if n > 1 else n for n in work.output_lens[:count]))  # fmt: skip


FULL = Scale({}, count=lambda n: n, length=lambda n: n, context=lambda n: n)
SMALL = Scale(TINY, count=lambda n: max(1, n // 32), length=lambda n: max(1, n // 64), context=lambda n: n // 16)


@dataclass
class Measured:
    """What a row came to, in its own unit; the value of each run; the share of the machine's limit; what else is to be told."""

    value: float
    samples: list[float]
    limit_share: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class Clock:
    """The time that is left. Everything asks before it begins something long."""

    def __init__(self, budget: float | None) -> None:
        self.end = time.monotonic() + budget if budget else float("inf")

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


@dataclass
class Bench:
    """An engine that is loaded, and what its rows need."""

    engine: Loaded
    config: dict[str, Any]
    scale: Scale
    limits: Limits
    clock: Clock
    repeat: int

    def seconds(self, work: Workload, seed: object) -> float:
        """One run of a workload with tokens of its own."""
        return self.run(work.prompts(seed, self.config["vocab_size"]), work.output_lens)

    def run(self, prompts: Sequence[list[int]], output_lens: Sequence[int]) -> float:
        """Seconds. LlmkitError when a token is missing: its time would mean nothing."""
        asks = {"temperature": 0.6, "ignore_eos": True, "detokenize": False}
        params = [self.engine.words.SamplingParams(max_tokens=n, **asks) for n in output_lens]
        begin = time.perf_counter()
        outputs = self.engine.llm.generate(list(prompts), params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        made = sum(len(o.outputs[0].token_ids) for o in outputs)
        if made != sum(output_lens):
            raise LlmkitError(f"{made:,} tokens were made where {sum(output_lens):,} were asked for", "a bug in the engine")
        return seconds

    def counted(self, *names: str) -> dict[str, int]:
        """What the engine has counted of these since it began; nothing, of one that does not tell."""
        llm = self.engine.llm
        stats = llm.stats() if hasattr(llm, "stats") else {}
        return {name: stats[name] for name in names if name in stats}

    def runs(self, measure: Callable[[int], float]) -> list[float]:
        """`repeat` times, fewer when the budget is over; at least once."""
        found = [measure(0)]
        while len(found) < self.repeat and self.clock.left > 0:
            found.append(measure(len(found)))
        return found


# ---- the measurements: one function a kind of row


def decode(batch: int) -> Callable[[Bench], Measured]:
    """ms a token at this batch size: 128 in, 256 out."""

    def measure(bench: Bench) -> Measured:
        from llmkit.bench.latency import decode_floor

        work = bench.scale.work(fixed(batch, 128, 256))
        first, steps = work.shortened(1), work.output_lens[0] - 1
        bench.seconds(work, "warm")
        samples = bench.runs(lambda i: 1e3 * (bench.seconds(work, f"w{i}") - bench.seconds(first, f"f{i}")) / steps)
        value = statistics.median(samples)
        floor = 1e3 * decode_floor(work, bench.limits)
        count = len(work.output_lens)
        return Measured(value, samples, floor / value, {"floor_ms": floor, "output_per_s": 1e3 * count / value})

    return measure


def throughput(make: Callable[[], Workload]) -> Callable[[Bench], Measured]:
    """Output tokens a second of a whole workload."""

    def measure(bench: Bench) -> Measured:
        work = bench.scale.work(make())
        bench.seconds(work, "warm")
        before = bench.counted("steps", "preemptions")
        samples = bench.runs(lambda i: bench.seconds(work, i))
        counted = {name: (n - before[name]) / len(samples) for name, n in bench.counted(*before).items()}
        taken = statistics.median(samples)
        need = bench.limits.workload(work, bench.engine.most_at_once)
        facts = {"seconds": taken, "requests_per_s": len(work.input_lens) / taken, "input_tokens": work.num_input,
                 "output_tokens": work.num_output, "floor_s": need.seconds, **counted}  # fmt: skip
        return Measured(work.num_output / taken, [work.num_output / s for s in samples], need.seconds / taken, facts)

    return measure


def prefill(count: int, length: int, unit: str) -> Callable[[Bench], Measured]:
    """`count` prompts of `length` and one token each: tokens a second, or ms."""

    def measure(bench: Bench) -> Measured:
        work = bench.scale.work(fixed(count, length, 1))
        bench.seconds(work, "warm")
        samples = bench.runs(lambda i: bench.seconds(work, i))
        taken, floor = statistics.median(samples), bench.limits.prefill(work.input_lens).seconds
        shown = [work.num_input / s if unit == "tok/s" else 1e3 * s for s in samples]
        facts = {"ms": 1e3 * taken, "input_per_s": work.num_input / taken, "floor_ms": 1e3 * floor}
        return Measured(statistics.median(shown), shown, floor / taken, facts)

    return measure


def prefix(kind: str) -> Callable[[Bench], Measured]:
    """Seconds of 64 prompts of 2048 + 64 tokens, 32 out. cold: the 2048 are shared and new; warm: shared and cached, with other
    endings; unshared: nobody shares anything."""

    def measure(bench: Bench) -> Measured:
        head, tail, count = bench.scale.length(2048), bench.scale.length(64), bench.scale.count(64)
        output_lens = [bench.scale.length(32)] * count
        vocab = min(VOCAB, bench.config["vocab_size"])

        def once(i: object) -> float:
            heads = tokens((head,) * (count if kind == "unshared" else 1), f"{kind}/{i}", vocab)
            cold, warm = ([heads[j % len(heads)] + t for j, t in enumerate(tokens((tail,) * count, f"{kind}/{end}/{i}", vocab))]
                          for end in ("first", "then"))  # fmt: skip
            seconds = bench.run(cold, output_lens)
            return bench.run(warm, output_lens) if kind == "warm" else seconds

        once("warm")
        before = bench.counted("prefix_cache_hits")
        samples = bench.runs(once)
        found = {name: n - before[name] for name, n in bench.counted(*before).items()}
        return Measured(statistics.median(samples), samples, None, found)

    return measure


# ---- the rows


@dataclass(frozen=True)
class Row:
    """One figure. engine: the model, then "@" and its context, then "+" and its quantisation; without a context it is measured in
    processes of its own. seconds: about how long it takes on an H100. starts: about how many engines it loads itself."""

    name: str
    what: str
    unit: str
    vllm: float
    must: float | None
    wants: float | None
    engine: str
    measure: Callable[[Any], Measured]
    seconds: float = 10
    starts: int = 0

    @property
    def more_is_better(self) -> bool:
        return self.unit == "tok/s"

    def beats(self, value: float, goal: float | None) -> bool | None:
        """Whether a value reaches a goal; None without one."""
        return None if goal is None else value >= goal if self.more_is_better else value <= goal

    def times(self, value: float, other: float) -> float | None:
        """How many times as good as another a value is; None where one of them means nothing."""
        return None if min(value, other) <= 0 else value / other if self.more_is_better else other / value


def _rows() -> list[Row]:
    a, long, b, fp8 = "A@4096", "A@16384", "B@4096", "A@4096+fp8"
    goals_a = {1: (6.19, 5.25, 4.95), 8: (6.32, 5.45, 5.2), 32: (6.44, 5.7, 5.4), 128: (7.77, 7.0, 6.4)}
    goals_b = {1: (2.97, 1.0, 0.75), 128: (6.07, 2.8, 2.4)}
    same = "64 x (2048 shared + 64), 32 out"
    return [
        *(Row(f"A-decode-{n}", f"decode, batch {n}", "ms", *g, a, decode(n)) for n, g in goals_a.items()),
        Row("A-nano", "256 sequences, in and out 100..1024", "tok/s", 10_913, 12_000, 13_000, a, throughput(nano), 60),
        Row("A-sharegpt", "1000 requests like ShareGPT's", "tok/s", 10_578, 12_500, 14_000, a, throughput(sharegpt), 80),
        Row("A-prefill-1x8192", "prefill 1 x 8192", "tok/s", 41_035, 41_000, 44_000, long, prefill(1, 8192, "tok/s")),
        Row("A-prefill-16x1024", "prefill 16 x 1024", "tok/s", 45_022, 45_000, 47_500, long, prefill(16, 1024, "tok/s")),
        Row("A-prefill-1x1024", "prefill 1 x 1024", "ms", 31, 25, 22, long, prefill(1, 1024, "ms"), 5),
        Row("A-prefill-1x128", "prefill 1 x 128", "ms", 13, 8, 6, long, prefill(1, 128, "ms"), 5),
        Row("A-prefix-cold", f"{same}, first time", "s", 0.440, 0.440, None, long, prefix("cold")),
        Row("A-prefix-warm", f"{same}, shared part cached", "s", 0.392, 0.392, 0.30, long, prefix("warm")),
        Row("A-prefix-unshared", "64 x 2112, nothing shared, 32 out", "s", 3.27, 3.27, None, long, prefix("unshared"), 20),
        Row("A-fp8-decode-1", "fp8 weights, decode, batch 1", "ms", 4.17, None, 3.0, fp8, decode(1)),
        Row("A-fp8-nano", "fp8 weights, 256 sequences", "tok/s", 12_282, None, 17_000, fp8, throughput(nano), 50),
        *(Row(f"B-decode-{n}", f"decode, batch {n}", "ms", *g, b, decode(n)) for n, g in goals_b.items()),
        Row("B-nano", "256 sequences, in and out 100..1024", "tok/s", 18_450, 22_000, 24_500, b, throughput(nano), 40),
        Row("A-ready-cold", "import + LLM(...), no compiled kernels", "s", 104.7, 12, 6, "A", ready("cold"), 40, 1),
        Row("A-ready-warm", "import + LLM(...), kernels compiled before", "s", 58.3, 12, 6, "A", ready("warm"), 60, 4),
        Row("A-memory", "GPU memory above before, after closing", "MiB", 73_155, 300, 100, "A", memory, 60, 3),
    ]


# ---- rows in processes of their own


@dataclass
class Fresh:
    """What a row in a fresh process needs: whose engine, and its options, the model's folder among them."""

    package: str
    options: dict[str, Any]
    clock: Clock
    repeat: int

    def start(self, loads: int, cache: str | None = None) -> dict[str, Any]:
        """Run llmkit.bench.fresh_process; what it says of itself."""
        from llmkit.bench.fresh_process import launch

        return launch(self.package, self.options, loads, cache)


def ready(kind: str) -> Callable[[Fresh], Measured]:
    """Seconds of `import` and `LLM(...)`; cold: no kernel is compiled yet. The first token, which needs them, is told beside."""

    def measure(fresh: Fresh) -> Measured:
        with tempfile.TemporaryDirectory() as kernels:
            said = [fresh.start(1, kernels)]
            if kind == "warm":
                said = [fresh.start(1, kernels)]
                while len(said) < fresh.repeat and fresh.clock.left > 0:
                    said.append(fresh.start(1, kernels))
        samples = [s["import_s"] + s["load_s"] for s in said]
        middle = said[samples.index(statistics.median_low(samples))]
        facts = {name: middle[name] for name in ("import_s", "load_s", "first_token_s", "stages", "facts") if name in middle}
        return Measured(statistics.median(samples), samples, None, facts)

    return measure


def memory(fresh: Fresh) -> Measured:
    """MiB that stay after three engines have come and gone in one process; and, beside, after that process has ended."""
    from llmkit.bench.fresh_process import used_memory

    before = used_memory()
    said = fresh.start(3)
    samples = [n / 2**20 for n in said["above_before"]]
    facts = {"above_before_bytes": said["above_before"], "held_bytes": said["held"],
             "after_the_process_bytes": used_memory() - before}  # fmt: skip
    return Measured(max(samples), samples, None, facts)


ROWS = {row.name: row for row in _rows()}


def select(names: str | None) -> list[Row]:
    """Those that `pick_rows` finds."""
    return [ROWS[name] for name in pick_rows(names, ROWS)]
