"""`llmkit bench kernels` at tiny shapes: in Triton's interpreter, or on a GPU. Every result is checked by the command itself."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton", reason="triton comes with torch's CUDA builds; without it there are no kernels to measure")

from llmkit_kernels import filters, gemm

from llmkit import cli
from llmkit.bench.kernels.cases import FULL, SMALL, cases
from llmkit.bench.kernels.cli import line
from llmkit.bench.kernels.work import Inputs, Work
from llmkit.models.config import ModelConfig

ON_GPU = torch.cuda.is_available()


def run(capsys, *argv):
    code = cli.main(["bench", "kernels", *map(str, argv)])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("which", [["B"], ["A", "--rows", "A-attention-decode,A-rotate-and-store"]])
def test_every_kernel_is_measured_and_right(which, tmp_path, capsys):
    file = tmp_path / "out.json"
    code, out, _ = run(capsys, *which, "--tiny", "--json", file)
    assert code == 0
    head, *rows = map(json.loads, file.read_text().splitlines())
    assert head["bench"] == "kernels"
    assert head["ceilings"]["read"] > 0
    assert [name for name in out.splitlines() if name.startswith(f"{which[0]}-")] == [line(r) for r in rows]
    unchecked = [r["name"] for r in rows if r["distance"] is None]
    assert all("-draw-" in name for name in unchecked), "only chance is not compared"
    for r in rows:
        assert not r["wrong"]
        assert min(r["us"], r["bytes"], r["limit_share"]) > 0
        assert r["gb_per_s"] == pytest.approx(r["bytes"] / r["us"] / 1e3)
        assert r["tflop_per_s"] == pytest.approx(r["flops"] / r["us"] / 1e6)


@pytest.mark.gpu
def test_every_kernel_is_right_on_a_gpu(capsys):
    code, out, _ = run(capsys, "--tiny")
    assert code == 0, out


def test_a_wrong_result_is_shown_and_counts_as_failure(monkeypatch, capsys):
    right = gemm.logits
    monkeypatch.setattr(gemm, "logits", lambda x, w: right(x, w) * 1.1)
    code, out, _ = run(capsys, "B", "--tiny", "--rows", "B-head-3")
    assert code == 1
    assert out.splitlines()[-1].endswith(" 1.0e-01  WRONG")


def test_what_is_never_written_is_wrong():
    """A NaN compares with nothing, and must not pass for that."""
    work = Work(lambda i: torch.full((3,), float("nan")), 1, 12, want=lambda: torch.ones(3))
    distance = work.error()
    assert distance is not None
    assert not distance <= 1.0


def test_a_kernel_that_breaks_leaves_the_others(monkeypatch, tmp_path, capsys):
    def broken(*args):
        raise RuntimeError("out of shared memory\nand more")

    monkeypatch.setattr(filters, "keep", broken)
    file = tmp_path / "out.json"
    code, out, _ = run(capsys, "B", "--tiny", "--rows", "B-keep-1,B-penalise-1", "--json", file)
    assert code == 1
    assert [r.split()[:2] for r in out.splitlines()[-2:]][1][0] == "B-keep-1"
    assert "B-keep-1                       broke: RuntimeError: out of shared memory" in out
    rows = [json.loads(text) for text in file.read_text().splitlines()[1:]]
    assert [("traceback" in r, r["wrong"]) for r in rows] == [(False, False), (True, True)]


def test_a_folder_with_a_config_gives_the_shapes(folder, tmp_path, capsys):
    (tmp_path / "some-model").mkdir()
    (tmp_path / "some-model" / "config.json").write_text((folder / "config.json").read_text())
    code, out, _ = run(capsys, tmp_path / "some-model", "--tiny", "--rows", "some-model-norm-1,some-model-qkv-3")
    assert code == 0
    assert [text.split()[0] for text in out.splitlines()[-2:]] == ["some-model-norm-1", "some-model-qkv-3"]
    assert str(tmp_path) not in out


def test_inputs_rotate_beyond_the_cache():
    """As many copies as fill what they rotate over; of what is larger, one."""
    given = Inputs(None, torch.device("cpu"), torch.float32, 1000)  # type: ignore[arg-type]
    assert [given.copies(n) for n in (1, 10, 300, 1000, 5000)] == [512, 100, 4, 1, 1]


def test_the_shapes_of_the_comparison_are_among_the_cases():
    """What must be shown of attention on an H100, by name."""
    from llmkit.bench.h100 import MODELS

    shape = Inputs(ModelConfig.from_dict(MODELS["A"]), torch.device("cpu"), torch.float32, 1)
    full, small = cases(shape, FULL), cases(shape, SMALL)
    assert {"attention-decode-128x2048", "attention-prefill-1x8192", "gate-up-128", "down-1", "norm-8192"} <= full.keys()
    assert {n.rstrip("0123456789x-") for n in full} == {n.rstrip("0123456789x-") for n in small}


@pytest.mark.parametrize(("argv", "message"), [
    (["C"], "C: there is no such folder\n"),
    (["--rows", "A-attention-decode-9", "--tiny"], "--rows A-attention-decode-9: there is no such row"),
    (["--json", "no/such/folder/x.json"], "the folder does not exist"),
    (["--tiny", "--markdown"], "--tiny gives no figures that belong into a table"),
])  # fmt: skip
def test_wrong_usage_is_told_before_anything_is_measured(argv, message, capsys):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1, "")
    assert message in err


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
@pytest.mark.parametrize(("argv", "triton"), [(["--tiny"], True), ([], True), (["--tiny"], False)])
def test_without_a_gpu_it_says_so(argv, triton, monkeypatch, capsys):
    if triton:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run(capsys, *argv)
    assert code == 1
    assert "there is no GPU here that runs our kernels" in err
    assert "llmkit bench throughput measures a CPU" in err
