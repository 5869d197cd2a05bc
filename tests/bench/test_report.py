"""What is printed and written."""

import json

import pytest

from llmkit.bench import report
from llmkit.bench.ceilings import Ceilings
from llmkit.bench.report import Machine, Report, Row, add_ratios, table, warnings

MACHINE = Machine("AMD EPYC", 4, 2, None, {"llmkit": "0.1", "torch": "2.13"}, "2026-01-31")
CEILINGS = Ceilings("cpu", "bfloat16", 70e9, 60e9, 0.8e12, 512 << 20, 2048, {"decode 1": 14.5})


def make(engine, step, **figures):
    return Row("decode", engine, "1.2", {"tpot_ms": step, "output_per_s": 1e3 / step, "spread": 0.05, "limit_ms": 4.0,
                                         "limit_share": 4 / step} | figures, {"whole_s": [1.0, 2.0]})  # fmt: skip


@pytest.fixture
def full():
    rows = [make("llmkit", 10.0), make("transformers", 25.0)]
    add_ratios(rows)
    return Report("latency", "m", "bfloat16", MACHINE, CEILINGS, rows, {"repeat": 3}, ["careful"])


def test_text_names_machine_and_ceilings_and_has_a_table(full):
    lines = full.text().splitlines()
    assert lines[0] == "llmkit bench latency · m · bfloat16"
    assert lines[1] == "AMD EPYC, 4 cores, 2 torch threads, no GPU · llmkit 0.1, torch 2.13 · 2026-01-31"
    assert lines[2].startswith("read 70.0 GB/s")
    assert lines[5:] == [
        "work    engine        TPOT ms  out tok/s  spread  limit ms  of limit  x transformers",
        "decode  llmkit          10.00      100.0      5%      4.00     40.0%            2.50",
        "decode  transformers    25.00       40.0      5%      4.00     16.0%",
        "warning: careful",
    ]


def test_markdown_fits_the_table_of_results(full):
    header = "| date | device | what | figure | share of limit |"
    from pathlib import Path

    assert header in Path(report.__file__).with_name("RESULTS.md").read_text("utf-8").splitlines()
    first, second = full.markdown().splitlines()
    assert first == ("| 2026-01-31 | AMD EPYC, 2 of 4 cores | latency: m bfloat16, decode, llmkit 1.2 "
                     "| TPOT ms 10.00; out tok/s 100.0; spread 5%; x transformers 2.50 | 40% |")  # fmt: skip
    assert second.count("|") == header.count("|")


def test_json_has_everything(full):
    data = json.loads(full.json())
    assert data["machine"]["versions"] == {"llmkit": "0.1", "torch": "2.13"}
    assert data["ceilings"]["read"] == 70e9
    assert data["rows"][0]["samples"] == {"whole_s": [1.0, 2.0]}
    assert data["rows"][0]["figures"]["vs_transformers"] == 2.5
    assert (data["options"], data["warnings"]) == ({"repeat": 3}, ["careful"])


def test_stages_are_shown_when_there_are_any(full):
    full.rows[0].stages = {"import": 1.2, "first token": 0.05}
    assert "llmkit: import 1.20, first token 0.05" in full.text().splitlines()


def test_cells_without_a_figure_stay_empty():
    rows = [Row("a", "llmkit", "1", {"seconds": 1.5}, {}), Row("b", "llmkit", "1", {"tpot_ms": 2.0}, {})]
    assert table(rows).splitlines() == ["work  engine     s  TPOT ms", "a     llmkit  1.50", "b     llmkit           2.00"]


@pytest.mark.parametrize(("before", "after", "busy"), [(1.9, 2.8, False), (2.1, 0.0, True), (0.0, 3.1, True)])
def test_a_busy_machine_is_named(before, after, busy):
    found = warnings([make("llmkit", 10.0)], before, after, cores=2)
    assert [w.endswith("figures are not to be trusted") for w in found] == [True] * busy


def test_scattered_runs_and_impossible_shares_are_named():
    found = warnings([make("llmkit", 10.0, spread=0.3), make("llmkit", 10.0, limit_share=1.2)], 0, 0, 2)
    assert [w.partition(": ")[2][:15] for w in found] == ["runs differ by ", "above the limit"]


def test_here():
    machine = Machine.here(2, None, ("transformers",))
    assert machine.cores >= 1
    assert machine.cpu
    assert list(machine.versions) == ["llmkit", "python", "torch", "transformers"]
    assert Machine.here(2, "NVIDIA H100").device == "NVIDIA H100"
