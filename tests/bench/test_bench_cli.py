"""`llmkit bench` as it is typed, on a tiny model; the clock is real, so figures are only looked at for being there."""

import json
import subprocess
import sys

import pytest

from llmkit import cli
from llmkit.bench import ceilings, measure
from llmkit.bench.ceilings import Sizes


@pytest.fixture(autouse=True)
def _small_and_steady(monkeypatch):
    """Tiny ceilings; runs of real engines whose time is the number of tokens in milliseconds."""
    monkeypatch.setitem(ceilings.SIZES, "cpu", Sizes(1 << 16, 16, 1 << 12, 0.0001))
    real = measure.timed

    def timed(contender, prompts, output_lens):
        real(contender, prompts, output_lens)
        return 1e-3 * sum(output_lens)

    monkeypatch.setattr(measure, "timed", timed)


def run(capsys, *argv):
    code = cli.main(["bench", *map(str, argv)])
    return code, *capsys.readouterr()


def test_latency_against_transformers(folder, tmp_path, capsys):
    file = tmp_path / "out.json"
    code, out, _ = run(capsys, "latency", folder, "--batch", 1, 3, "--input-len", 5, "--output-len", 4, "--prefill", 9,
                       "--repeat", 2, "--against", "transformers",
                       "--json", file, "--markdown", "--max-model-len", 64)  # fmt: skip
    assert code == 0
    assert out.startswith(f"llmkit bench latency · {folder.name} · float32\n")
    data = json.loads(file.read_text())
    works = ["decode, batch 1 (5 in, 4 out)", "decode, batch 3 (5 in, 4 out)", "prefill 9"]
    assert [(r["work"], r["engine"]) for r in data["rows"]] == [(w, e) for w in works for e in ("llmkit", "transformers")]
    assert [r["figures"].get("vs_transformers") for r in data["rows"]] == [1, None] * 3
    assert data["rows"][0]["figures"]["tpot_ms"] == pytest.approx(1)
    assert list(data["ceilings"]["model_matmul_ms"]) == ["decode 1", "decode 3", "prefill 9"]
    assert (data["options"]["batch"], data["options"]["max_model_len"]) == ([1, 3], 64)
    assert len([line for line in out.splitlines() if line.startswith("| 2")]) == 6
    assert str(folder.parent) not in file.read_text() + out


def test_throughput_with_a_static_batch_smaller_than_the_work(folder, tmp_path, capsys):
    file = tmp_path / "out.json"
    code, out, _ = run(capsys, "throughput", folder, "--num-prompts", 5, "--input-len", 5, "--output-len", 4, "--repeat", 1,
                       "--static-batch", 2, "--against", "transformers", "--json", file)  # fmt: skip
    assert code == 0
    ours, theirs = (r["figures"] for r in json.loads(file.read_text())["rows"])
    assert ours["output_per_s"] == pytest.approx(1000)
    assert theirs["total_per_s"] == pytest.approx(2250)
    assert ours["limit_share"] == theirs["limit_share"] > 0
    assert "of matmul" in out
    assert "| 2" not in out


def test_startup(folder, capsys):
    code, out, _ = run(capsys, "startup", folder, "--repeat", 1, "--max-model-len", 64)
    assert code == 0
    assert "cold start to first token  llmkit" in out
    assert "llmkit: python " in out


def test_contenders_answer_alike(folder):
    """In float32 both choose the same tokens, also behind left padding: so both do the same work, and all of it."""
    from llmkit.bench.contenders import CONTENDERS, Subject
    from llmkit.bench.workload import Workload

    subject = Subject.of({"model": str(folder), "max_model_len": 64}, static_batch=2)
    work = Workload("ragged", (3, 9, 6), (7, 2, 5))
    answers = {}
    for name, make in CONTENDERS.items():
        contender = make(subject)
        answers[name] = contender.generate(work.prompts(0, 64), work.output_lens)
        contender.close()
    assert [len(a) for a in answers["llmkit"]] == [7, 2, 5]
    assert answers["transformers"] == answers["llmkit"]


@pytest.mark.parametrize(("argv", "message"), [
    (["latncy"], "llmkit bench has no command 'latncy'\n  -> did you mean latency?"),
    (["latency", "--batch", "0"], "argument --batch: must be at least 1; got 0"),
    (["latency", "--prefill", "-3"], "argument --prefill: must not be negative; got -3"),
    (["throughput", "--num-prompts", "many"], "argument --num-prompts: invalid positive value: 'many'"),
    (["throughput", "--workload", "nona"], "--workload cannot be 'nona'\n  -> did you mean nano?"),
    (["throughput", "--agianst", "transformers"], "has no option --agianst\n  -> did you mean --against?"),
    (["startup", "--against", "transformer"], "--against cannot be 'transformer'\n  -> did you mean transformers?"),
])
def test_wrong_usage(argv, message, capsys):
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert message in err


@pytest.mark.parametrize(("argv", "message"), [
    (["latency", "--output-len", "1"], "needs at least two tokens"),
    (["throughput", "--workload", "nano", "--num-prompts", "257"], "nano has 256 requests, not 257"),
    (["startup", "--json", "no/such/folder/x.json"], "the folder does not exist"),
    (["throughput", "--against", "transformers", "--kv-cache-dtype", "fp8"], "other work\n  -> drop --kv-cache-dtype"),
    (["startup", "--against", "transformers", "--kv-cache-dtype", "fp8"], "other work\n  -> drop --kv-cache-dtype"),
])
def test_what_cannot_be_measured_is_said_before_anything_is_loaded(argv, message, capsys):
    code, _, err = run(capsys, *argv)
    assert code == 1
    assert message in err


def test_work_longer_than_the_context(folder, capsys):
    code, _, err = run(capsys, "throughput", folder, "--max-model-len", 64, "--input-len", 61, "--output-len", 4)
    assert code == 1
    assert "needs a context of 65 tokens, llmkit has 64" in err


@pytest.mark.parametrize("argv", [[], ["-h"], ["throughput", "-h"], ["latency", "-h"], ["startup", "-h"]])
def test_help_needs_nothing_heavy(argv):
    code = f"import sys, llmkit.cli\ntry: llmkit.cli.main(['bench', *{argv}])\nexcept SystemExit: pass\nprint(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment()).stdout
    assert found.startswith("usage: llmkit bench")
    assert not {"torch", "transformers", "numpy"} & set(found.splitlines()[-1].split())


def environment():
    from llmkit.bench.startup import _environment

    return _environment()
