"""The rows for an H100: the same work as everybody's, each measured at tiny size, goals and shares as they are shown."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from unittest.mock import Mock

import pytest

import llmkit
from llmkit import cli
from llmkit.bench import fresh_process, h100, suite, workload
from llmkit.bench.ceilings import Ceilings
from llmkit.bench.engines import LOAD_SECONDS, Loaded, known_options
from llmkit.bench.h100 import FULL, ROWS, SMALL, Bench, Clock, Measured, select
from llmkit.bench.limits import Limits, ModelCost
from llmkit.bench.suite import Suite, line, markdown
from llmkit.errors import ConfigError, LlmkitError
from llmkit.models.config import ModelConfig

PEERS = {  # every figure of the comparison: vLLM's, what must be reached, what is wanted
    "A-decode-1": (6.19, 5.25, 4.95), "A-decode-8": (6.32, 5.45, 5.2), "A-decode-32": (6.44, 5.7, 5.4),
    "A-decode-128": (7.77, 7.0, 6.4), "A-nano": (10913, 12000, 13000), "A-sharegpt": (10578, 12500, 14000),
    "A-prefill-1x8192": (41035, 41000, 44000), "A-prefill-16x1024": (45022, 45000, 47500), "A-prefill-1x1024": (31, 25, 22),
    "A-prefill-1x128": (13, 8, 6), "A-prefix-cold": (0.44, 0.44, None), "A-prefix-warm": (0.392, 0.392, 0.3),
    "A-prefix-unshared": (3.27, 3.27, None), "A-fp8-decode-1": (4.17, None, 3.0), "A-fp8-nano": (12282, None, 17000),
    "B-decode-1": (2.97, 1.0, 0.75), "B-decode-128": (6.07, 2.8, 2.4), "B-nano": (18450, 22000, 24500),
    "A-ready-cold": (104.7, 12, 6), "A-ready-warm": (58.3, 12, 6), "A-memory": (73155, 300, 100),
}  # fmt: skip


def test_the_rows_are_all_there_with_their_figures():
    assert {name: (r.vllm, r.must, r.wants) for name, r in ROWS.items()} == PEERS


def test_the_work_is_everybodys():
    """Lengths and tokens as other engines were given them."""
    nano, chat = workload.nano(), workload.sharegpt()
    assert (nano.num_input, nano.num_output, chat.num_input, chat.num_output) == (144_831, 144_160, 206_310, 199_256)
    assert FULL.work(nano) == nano
    ids = workload.tokens((128,) * 3, "w0")
    assert hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16] == "a721fc25cb9144fd"


@pytest.mark.parametrize("name", ["A", "B"])
def test_the_models_are_as_big_as_they_should_be(name):
    cost = ModelCost.of(ModelConfig.from_dict(h100.MODELS[name]), 2)
    assert cost.weight_bytes == pytest.approx({"A": 14.14e9, "B": 1.19e9}[name], rel=0.01)
    assert Limits(cost, 3.13e12, 756e12).decode([256]).seconds == pytest.approx({"A": 4.52e-3, "B": 0.38e-3}[name], rel=0.04)


def test_rows_are_chosen_by_the_beginning_of_their_names():
    assert [r.name for r in select("A-decode, B-nano")] == [*(f"A-decode-{n}" for n in (1, 8, 32, 128)), "B-nano"]
    assert [r.name for r in select("A-decode-1")] == ["A-decode-1"]  # and not 128
    assert [r.name for r in select("B")] == ["B-decode-1", "B-decode-128", "B-nano"]
    assert len(select(None)) == len(select("")) == len(ROWS)
    with pytest.raises(ConfigError, match=r"--rows A-decod: there is no such row\n.*A-decode-1, "):
        select("A-decod")


def test_every_row_runs_and_each_is_written_when_it_is_there(tmp_path, capsys):
    file = tmp_path / "out.jsonl"
    assert cli.main(["bench", "--suite", "h100", "--tiny", "--repeat", "1", "--device", "cpu", "--json", str(file)]) == 0
    head, *rows = (json.loads(x) for x in file.read_text().splitlines())
    assert head["ceilings"]["read"] > 0
    assert {r["name"] for r in rows} == set(ROWS)
    quantised = {r["name"] for r in rows if "skipped" in r}
    assert quantised == {"A-fp8-decode-1", "A-fp8-nano"}
    assert all("fp8" in r["skipped"] for r in rows if "skipped" in r)
    measured = {r["name"]: r for r in rows if "value" in r}
    for name, row in measured.items():
        assert row["value"] > 0 or name == "A-memory" or "decode" in name  # a difference of two runs; a busy machine slows either
        assert (row["limit_share"] is not None) == (name.split("-")[1] in ("decode", "nano", "sharegpt", "prefill"))
        assert "times_vllm" not in row  # a tiny model compares with nothing
    warm, unshared = (measured[f"A-prefix-{kind}"]["facts"]["prefix_cache_hits"] for kind in ("warm", "unshared"))
    assert warm > unshared == 0
    assert {"import_s", "load_s", "first_token_s", "stages"} <= measured["A-ready-warm"]["facts"].keys()
    assert len(measured["A-memory"]["facts"]["above_before_bytes"]) == 3
    out = capsys.readouterr().out
    assert all(name in out for name in ROWS)


OTHER = """
from types import SimpleNamespace as Thing

import torch
from llmkit import LLM as Ours, SamplingParams

closed = []


class LLM:
    def __init__(self, **options):
        self.ours = Ours(**options)
        self.llm_engine = Thing(
            vllm_config=Thing(scheduler_config=Thing(max_num_seqs=8), model_config=Thing(dtype=torch.float32, quantization=None),
                              cache_config=Thing(cache_dtype="auto")),
            engine_core=Thing(shutdown=self.close))

    def generate(self, prompts, params, use_tqdm):
        return self.ours.generate(prompts, params, use_tqdm)

    def close(self):
        closed.append(self.ours.close())
"""


def pretend_vllm(place, monkeypatch, code: str = OTHER) -> None:
    (place / "vllm.py").write_text(code)
    (place / "vllm-0.26.dist-info").mkdir()
    (place / "vllm-0.26.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.26\n")
    monkeypatch.syspath_prepend(place)
    monkeypatch.setitem(sys.modules, "vllm", None)  # so that it is taken out again
    monkeypatch.delitem(sys.modules, "vllm")


def test_another_engine_does_the_same_work(tmp_path, monkeypatch, capsys):
    pretend_vllm(tmp_path, monkeypatch)
    asked: dict[str, list] = {"llmkit": [], "vllm": []}
    run = Bench.run

    def noting(self, prompts, output_lens):
        asked[self.engine.words.__name__].append((list(prompts), list(output_lens)))
        return run(self, prompts, output_lens)

    monkeypatch.setattr(Bench, "run", noting)
    names, file = ["A-decode-8", "A-nano", "A-prefix-warm", "B-decode-1", "A-ready-cold", "A-memory"], tmp_path / "out.jsonl"
    flags = ["--tiny", "--repeat", "1", "--rows", ",".join(names), "--json", str(file), "--markdown"]
    assert cli.main(["bench", "--suite", "h100", "--against", "vllm", *flags]) == 0
    _, *rows = (json.loads(x) for x in file.read_text().splitlines())
    assert [(r["package"], r["name"]) for r in rows] == [(p, n) for p in ("llmkit", "vllm") for n in names]
    assert {r["version"] for r in rows if r["package"] == "vllm"} == {"0.26"}
    assert all("value" in r for r in rows)
    assert asked["llmkit"] == asked["vllm"]
    out = capsys.readouterr().out
    assert out.index("vllm 0.26, the same work") > out.index("B-decode-1")
    assert sum(", vllm 0.26 |" in x for x in out.splitlines()) == len(names)
    import vllm  # type: ignore[import-not-found]

    assert len(vllm.closed) == 3  # those of this process: A, A with a longer context, B


def test_another_engine_must_be_there_and_be_told_the_same(tmp_path, monkeypatch, capsys):
    suite_of = ["bench", "--suite", "h100", "--against", "vllm"]
    assert cli.main(suite_of) != 0
    assert "--against vllm: it is not installed" in capsys.readouterr().err
    pretend_vllm(tmp_path, monkeypatch)
    assert cli.main([*suite_of, "--deterministic"]) != 0
    assert "--against vllm: it cannot be told --deterministic" in capsys.readouterr().err
    assert cli.main(["bench", "--against", "vllm"]) != 0
    assert "add --suite h100" in capsys.readouterr().err


def test_another_engine_that_cannot_be_had_leaves_what_was_measured(tmp_path, monkeypatch, capsys):
    pretend_vllm(tmp_path, monkeypatch, "raise RuntimeError('no such symbol')")
    flags = ["--tiny", "--repeat", "1", "--rows", "B-decode-1", "--markdown"]
    assert cli.main(["bench", "--suite", "h100", "--against", "vllm", *flags]) == 1
    out = capsys.readouterr().out
    assert "broke: RuntimeError: no such symbol" in out
    assert f"h100: B-decode-1, decode, batch 1, llmkit {llmkit.__version__} |" in out


def test_all_are_told_the_same():
    given = {"model": "x", "max_model_len": 4096}
    assert known_options("llmkit", given) == given
    assert known_options("vllm", given) == given | {"gpu_memory_utilization": 0.9}
    assert known_options("vllm", given | {"gpu_memory_utilization": 0.5})["gpu_memory_utilization"] == 0.5


def test_how_many_times_as_fast():
    assert ROWS["A-nano"].times(12_000, 10_000) == pytest.approx(1.2)
    assert ROWS["A-decode-1"].times(5.0, 6.0) == pytest.approx(1.2)
    assert ROWS["A-memory"].times(0, 73_155) is None


class Answering:
    """An engine whose clock ticks one second a token."""

    def __init__(self, monkeypatch, short: int = 0) -> None:
        self.now, self.short, self.asked = 0.0, short, []
        monkeypatch.setattr(h100.time, "perf_counter", lambda: self.now)

    def generate(self, prompts, params, use_tqdm):
        from types import SimpleNamespace as Thing

        self.asked.append((prompts, params))
        self.now += sum(p.max_tokens for p in params)
        return [Thing(outputs=[Thing(token_ids=[0] * (p.max_tokens - self.short))]) for p in params]

    def stats(self):
        return {"steps": 0, "preemptions": 0, "prefix_cache_hits": 0}


def bench(llm, scale=FULL, budget=None, repeat=3) -> Bench:
    cost = ModelCost.of(ModelConfig.from_dict(scale.config("A")), 2)
    return Bench(Loaded(llm, llmkit, 256, (2, 2)), scale.config("A"), scale, Limits(cost, 3.13e12, 756e12), Clock(budget), repeat)


def test_decode_is_what_all_tokens_take_beyond_the_first(monkeypatch):
    llm = Answering(monkeypatch)
    found = ROWS["A-decode-8"].measure(bench(llm))
    assert found.value == pytest.approx(8 * 1000)  # 8 tokens a step, a second each
    assert found.samples == [found.value] * 3
    assert found.limit_share == pytest.approx(4.56e-3 / 8, rel=0.02)
    prompts = [tuple(map(tuple, p)) for p, _ in llm.asked]
    assert len(prompts) == len(set(prompts)) == 7  # once to warm up, then 256 and 1, each three times, with tokens of their own
    assert {(len(p), len(p[0])) for p in prompts} == {(8, 128)}
    assert {(q.temperature, q.ignore_eos, q.detokenize) for _, params in llm.asked for q in params} == {(0.6, True, False)}


def test_a_prefix_is_cold_once_and_then_warm(monkeypatch):
    for kind, runs, heads in (("cold", 4, 4), ("warm", 8, 4), ("unshared", 4, 4 * 64)):
        llm = Answering(monkeypatch)
        assert ROWS[f"A-prefix-{kind}"].measure(bench(llm)).value == 64 * 32
        prompts = [p for asked, _ in llm.asked for p in asked]
        assert len(llm.asked) == runs
        assert {len(p) for p in prompts} == {2112}
        assert len({tuple(p[:2048]) for p in prompts}) == heads
        assert len({tuple(p) for p in prompts}) == len(prompts)


def test_missing_tokens_are_an_error(monkeypatch):
    with pytest.raises(LlmkitError, match="tokens were made where"):
        ROWS["A-nano"].measure(bench(Answering(monkeypatch, short=1)))


def test_a_budget_ends_the_runs_and_then_the_rows(monkeypatch, capsys):
    ticks = itertools.count()
    monkeypatch.setattr(h100.time, "monotonic", lambda: float(next(ticks)))
    assert len(bench(Answering(monkeypatch), budget=1).runs(lambda i: 1.0)) == 1
    rows = [h100.Row("A-nano", "x", "tok/s", 1, 2, 3, "A@4096", lambda bench: Measured(1.0, []), seconds=1e6)]
    made = Suite(rows, FULL, Clock(100), 1, None, {})
    made._measure("llmkit", rows, None, None, None)  # type: ignore[arg-type]  # nothing is loaded
    assert "--budget" in made.results[0]["skipped"]
    assert "skipped: --budget" in capsys.readouterr().out


def test_a_row_that_starts_engines_itself_is_given_the_time_they_take(monkeypatch):
    monkeypatch.setattr("llmkit.bench.suite.version", lambda package: "0")
    row = h100.Row("A-memory", "x", "MiB", 10, 5, 1, "A", lambda fresh: Measured(2.0, [2.0]), seconds=60, starts=3)
    for package, seconds in (("llmkit", 60), ("vllm", 60 + 3 * LOAD_SECONDS["vllm"])):
        for left, measured in ((seconds + 1, True), (seconds - 1, False)):
            made = Suite([row], FULL, Clock(left), 1, None, {})
            made._one(package, row, None, Mock(date="today"))
            assert ("value" in made.results[0]) == measured


def test_a_row_that_breaks_leaves_the_others(monkeypatch, tmp_path, capsys):
    def breaks(bench):
        raise RuntimeError("CUDA error: something")

    fine = h100.Row("A-memory", "x", "MiB", 10, 5, 1, "A", lambda fresh: Measured(2.0, [2.0]))
    rows = [h100.Row("A-ready-cold", "x", "s", 1, 2, 3, "A", breaks), fine]
    monkeypatch.setattr(Suite, "_ceilings", lambda self, device: Ceilings("cpu", "float32", 1, 1, 1, 1, 1))
    made = Suite(rows, FULL, Clock(None), 1, None, {"device": "cpu"})
    assert made.run() == 1
    broken, kept = made.results
    assert (broken["error"], kept["value"]) == ("RuntimeError: CUDA error: something", 2.0)
    assert "in breaks" in broken["traceback"]
    assert (kept["reaches_must"], kept["reaches_wants"], kept["times_vllm"]) == (True, False, 5.0)
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2].endswith("broke: RuntimeError: CUDA error: something")
    assert shown[-1].split()[-3:] == ["5.00", "–", "must"]
    assert line(kept | {"reaches_must": False}).endswith("below")
    mine = f"llmkit {llmkit.__version__}"
    assert f"| h100: A-memory, x, {mine} | 2 MiB (vLLM 0.26: 10) | – |" in markdown(made.results, "an H100", {})
    elsewhere = markdown(made.results, "gpu", {"seed": 3})
    assert f"| h100: A-memory, x, seed=3, {mine} | 2 MiB (vLLM 0.26 on an H100: 10) |" in elsewhere


def test_another_engine_is_shown_beside_llmkit(monkeypatch, capsys):
    """llmkit's row first; how many times as fast it was stands in the other's."""
    monkeypatch.setattr(suite, "version", lambda package: "1")
    row = h100.Row("A-nano", "x", "tok/s", 10, 20, 30, "A@4096", lambda bench: Measured(1.0, []))
    made = Suite([row], FULL, Clock(None), 1, None, {}, ("vllm",))
    made._keep("llmkit", row, {"value": 24.0, "limit_share": 0.5, "date": "d"})
    made._keep("vllm", row, {"value": 12.0, "limit_share": 0.25, "date": "d"})
    ours, theirs = capsys.readouterr().out.splitlines()
    assert ours.split()[-3:] == ["2.40", "50.0%", "must"]
    assert theirs.endswith("–     25.0%  llmkit x 2.00")
    assert markdown(made.results, "gpu", {}).splitlines()[1].endswith(", x, vllm 1 | 12 tok/s (llmkit x 2.00) | 25% |")


def test_a_process_that_dies_says_why(tmp_path):
    with pytest.raises(LlmkitError, match=r"ended with code 1:(.|\n)*no_such_option"):
        fresh_process.launch("llmkit", {"model": str(tmp_path), "no_such_option": 1}, 1)


def test_small_is_small():
    work = SMALL.work(workload.nano())
    assert len(work.input_lens) == 8
    assert work.longest <= 32
    assert min(work.output_lens) >= 2
    assert suite.HEADING.split()[:2] == ["row", "vLLM"]
