"""Timing, rows and ratios, with contenders whose time is made up: what they did is counted, what it took is computed."""

import re
from types import SimpleNamespace

import pytest

from llmkit.bench import measure, startup
from llmkit.bench.contenders import check_length
from llmkit.bench.latency import LatencyPlan, decode_floor, measure_latency
from llmkit.bench.limits import Limits, ModelCost
from llmkit.bench.measure import rounds, spread, timed, warm_up
from llmkit.bench.report import add_ratios
from llmkit.bench.startup import Start, first_token, measure_startup
from llmkit.bench.throughput import measure_throughput
from llmkit.bench.workload import Workload, fixed
from llmkit.errors import ConfigError, LlmkitError

LIMITS = Limits(ModelCost(1000, 100, 2, 8, 4, ((None, 2),), 2), 1e6, 1e8)


class Robot:
    """Takes `prefill` seconds, and `step` seconds for each token after the first of its longest answer."""

    version, longest, max_num_seqs = "1.0", 64, 4

    def __init__(self, name, clock, prefill, step):
        self.name, self.clock, self.prefill, self.step, self.calls = name, clock, prefill, step, []

    def generate(self, prompts, output_lens):
        self.calls.append(([tuple(p) for p in prompts], list(output_lens)))
        self.clock.now += self.prefill + self.step * (max(output_lens) - 1)
        self.clock.order.append(self.name)
        return [[0] * n for n in output_lens]

    def close(self):
        self.closed = True


@pytest.fixture
def robots(monkeypatch):
    clock = SimpleNamespace(now=0.0, order=[])
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return [Robot("llmkit", clock, 0.5, 0.01), Robot("transformers", clock, 0.6, 0.03)]


def test_rounds_take_turns_with_the_same_tokens_and_new_ones_each_round(robots):
    seconds = rounds(robots, fixed(2, 4, 3), 3, 100, "s")
    assert robots[0].clock.order == ["llmkit", "transformers"] * 3
    assert robots[0].calls == robots[1].calls
    assert len({p for prompts, _ in robots[0].calls for p in prompts}) == 6
    assert seconds == {"llmkit": pytest.approx([0.52] * 3), "transformers": pytest.approx([0.66] * 3)}


def test_warm_up_is_short_and_has_tokens_of_its_own(robots):
    warm_up(robots, fixed(2, 4, 30), 100)
    rounds(robots, fixed(2, 4, 30), 1, 100, "s")
    (warm, lens), (timed_prompts, _) = robots[0].calls
    assert lens == [8, 8]
    assert not set(warm) & set(timed_prompts)


def test_a_contender_that_ends_early_is_not_timed(robots):
    robots[0].generate = lambda prompts, output_lens: [[0], [0] * 3]
    with pytest.raises(LlmkitError, match="llmkit produced 4 tokens where 6 were asked for"):
        timed(robots[0], [[1], [2]], [3, 3])


def test_spread():
    assert spread([2.0, 2.0]) == 0
    assert spread([1.0, 2.0, 4.0]) == 1.5


def test_latency(robots):
    plan = LatencyPlan(batches=(1, 8), input_len=6, output_len=11, prefills=(20,), repeat=2)
    rows = measure_latency(robots, plan, LIMITS, 100)
    add_ratios(rows)
    works = ("decode, batch 1 (6 in, 11 out)", "decode, batch 8 (6 in, 11 out)", "prefill 20")
    assert [(r.work, r.engine) for r in rows] == [(w, e) for w in works for e in ("llmkit", "transformers")]
    ours, eight, prefill = (r.figures for r in rows[::2])
    assert (ours["ttft_ms"], ours["tpot_ms"], ours["output_per_s"]) == pytest.approx((500, 10, 100))
    floor = sum(LIMITS.decode([c]).seconds for c in range(7, 17)) / 10
    assert ours["limit_share"] == pytest.approx(floor / 0.01)
    assert ours["vs_transformers"] == pytest.approx(3)
    assert eight["output_per_s"] == pytest.approx(800)
    assert eight["limit_ms"] == pytest.approx(1e3 * decode_floor(fixed(8, 6, 11), LIMITS))
    assert prefill["input_per_s"] == pytest.approx(40)
    assert prefill["limit_share"] == pytest.approx(LIMITS.prefill([20]).seconds / 0.5)
    assert prefill["vs_transformers"] == pytest.approx(1.2)
    assert rows[0].samples == {"first_s": pytest.approx([0.5] * 2), "whole_s": pytest.approx([0.6] * 2)}


def test_latency_that_drowns_in_noise_is_an_error(robots):
    robots[1].step = 0.0
    with pytest.raises(LlmkitError, match="11 tokens of transformers took no longer than one"):
        measure_latency(robots, LatencyPlan(output_len=11, input_len=4, prefills=(), repeat=1), LIMITS, 100)


def test_throughput(robots):
    work = Workload("w", (4, 6), (11, 5))
    rows = measure_throughput(robots, work, 2, LIMITS, 100)
    add_ratios(rows)
    ours, need = rows[0].figures, LIMITS.workload(work, 4)
    assert (ours["seconds"], ours["output_per_s"], ours["total_per_s"]) == pytest.approx((0.6, 16 / 0.6, 26 / 0.6))
    shares = (need.seconds, need.flops / LIMITS.flops, need.bytes / LIMITS.bandwidth)
    assert (ours["limit_share"], ours["matmul_share"], ours["bandwidth_share"]) == pytest.approx(tuple(s / 0.6 for s in shares))
    assert ours["vs_transformers"] == pytest.approx(1.5)
    assert "vs_llmkit" not in rows[1].figures


def test_work_that_does_not_fit_is_refused_before_anything_runs(robots):
    with pytest.raises(ConfigError, match="needs a context of 65 tokens, llmkit has 64"):
        measure_throughput(robots, fixed(2, 60, 5), 1, LIMITS, 100)
    check_length(robots, 64)
    assert robots[0].calls == []


# ---- startup


def test_startup_takes_turns_and_does_not_count_the_first_start(monkeypatch):
    seconds = {"llmkit": iter([90.0, 2.0, 4.0, 3.0]), "transformers": iter([99.0, 9.0, 6.0, 5.0])}
    asked = []

    def start(engine, options):
        asked.append((engine, options))
        t = next(seconds[engine])
        facts = {"folder": "f", "dtype": "bfloat16", "device": "cpu", "threads": 2, "gpu": None, "peak_rss": 5e6}
        return Start({"python": 0.1, "import": 1.0, "ready": t - 0.25, "token": t}, facts)

    monkeypatch.setattr(startup, "first_token", start)
    rows, facts = measure_startup({"model": "m"}, ["transformers"], 3)
    add_ratios(rows)
    assert [e for e, _ in asked] == ["llmkit", "transformers"] * 4
    assert asked[:2] == [("llmkit", {"model": "m"}), ("transformers", {"folder": "f", "dtype": "bfloat16", "device": "cpu"})]
    assert rows[0].figures == pytest.approx(
        {"seconds": 3.0, "ready_s": 2.75, "peak_rss_mb": 5.0, "spread": 2 / 3, "vs_transformers": 2.0})
    assert rows[0].stages == pytest.approx({"python": 0.1, "import": 0.9, "load": 1.75, "first token": 0.25})
    assert facts["threads"] == 2


def test_the_stages_of_llmkit_are_its_own_report():
    times = {"python": 0.1, "import": 1.0, "ready": 2.0, "token": 2.5}
    stages = Start(times, {"stages": {"import": 0.8, "weights": 0.6, "KV cache": 0.2}}).stages
    assert stages == pytest.approx({"python": 0.1, "import": 0.9, "weights": 0.6, "KV cache": 0.2, "first token": 0.5})


def test_a_real_start(folder):
    start = first_token("llmkit", {"model": str(folder), "max_model_len": 64})
    assert list(start.times) == ["python", "import", "ready", "token", "facts"]
    assert list(start.times.values()) == sorted(start.times.values())
    assert {"find the model", "tokenizer", "weights", "KV cache"} <= start.facts["stages"].keys()
    assert (start.facts["folder"], start.facts["device"], start.facts["dtype"]) == (str(folder), "cpu", "float32")
    assert 50e6 < start.facts["peak_rss"] < 4e9


def test_a_start_that_fails_says_the_childs_last_words(tmp_path):
    with pytest.raises(LlmkitError, match=re.escape("llmkit ended with code 1 before its first token")) as e:
        first_token("llmkit", {"model": str(tmp_path)})
    assert str(tmp_path) in e.value.message
