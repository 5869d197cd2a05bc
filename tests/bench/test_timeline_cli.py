"""`llmkit bench timeline` as it is typed, on a tiny model, with weights and without."""

import json
import shutil

import pytest

from llmkit import cli
from llmkit.timeline import load_timelines


def run(capsys, *argv):
    code = cli.main(["bench", "timeline", *map(str, argv)])
    return code, *capsys.readouterr()


def test_every_batch_size_with_its_biggest_kernels(folder, tmp_path, capsys):
    file, kept = tmp_path / "out.json", tmp_path / "out.json.gz"
    code, out, _ = run(capsys, folder, "--batch", "1,3", "--input-len", 5, "--output-len", 7, "--max-model-len", 64,
                       "--json", file, "--save", kept)  # fmt: skip
    assert code == 0
    assert out.startswith(f"llmkit bench timeline · {folder.name} · float32\n")
    heads = [line.split(":")[0] for line in out.splitlines() if line.startswith("decode")]
    assert heads == ["decode, batch 1", "decode, batch 3"]
    assert len([line for line in out.splitlines() if " × " in line]) == 10
    data = json.loads(file.read_text())
    assert [(row["batch"], row["steps"]) for row in data["rows"]] == [(1, 5), (3, 5)], "all but the prompts' and the first one"
    assert all(0 < row["busy"] <= 1 and row["step_ms"] > 0 for row in data["rows"])
    assert str(folder.parent) not in file.read_text() + out
    timelines = load_timelines(kept)
    assert [len(t.tokens) for t in timelines.values()] == [1, 3]
    for t, row in zip(timelines.values(), data["rows"]):
        assert t.busy == pytest.approx(row["profiled_busy"], rel=1e-3)
        assert all(s.tokens == s.decodes == row["batch"] for s in t.steps)


def test_a_config_is_enough(folder, tmp_path, capsys):
    shutil.copy(folder / "config.json", tmp_path)
    code, out, _ = run(capsys, tmp_path, "--load-format", "dummy", "--skip-tokenizer-init", "--enforce-eager",
                       "--input-len", 4, "--output-len", 4, "--max-model-len", 64)  # fmt: skip
    assert code == 0
    assert "decode, batch 1: " in out


@pytest.mark.parametrize(("argv", "code", "message"), [
    (["--batch", "1,x"], 2, "must be whole numbers with commas between, as 1,128; got '1,x'"),
    (["--batch", "0"], 2, "must be at least 1; got 0"),
    (["--output-len", "3"], 1, "--output-len 4 or more"),
    (["--json", "no/such/folder/x.json"], 1, "the folder does not exist"),
    (["--save", "no/such/folder/x.json"], 1, "the folder does not exist"),
])  # fmt: skip
def test_what_cannot_be_measured_is_said_before_anything_is_loaded(argv, code, message, capsys):
    found, _, err = run(capsys, *argv)
    assert found == code
    assert message in err


def test_work_longer_than_the_context(folder, capsys):
    code, _, err = run(capsys, folder, "--max-model-len", 64, "--input-len", 61, "--output-len", 4)
    assert code == 1
    assert "needs a context of 65 tokens, llmkit has 64" in err
