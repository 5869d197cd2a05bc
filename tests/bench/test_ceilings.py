"""The ceilings are measured with tiny sizes: structure, units, and the clockwork; no figure is compared with anything."""

import json

import torch

from llmkit.bench.ceilings import Ceilings, Sizes, Step, best_seconds, layer_matrices, measure_ceilings
from llmkit.models.config import ModelConfig

TINY = Sizes(read=1 << 16, square=16, rotate=1 << 12, seconds=0.001)
CPU = torch.device("cpu")


def model(folder) -> ModelConfig:
    return ModelConfig.from_dict(json.loads((folder / "config.json").read_text()))


def test_measures_everything_that_is_asked(folder):
    found = measure_ceilings(CPU, torch.float32, model(folder), [Step(1, 1), Step(32, 1), Step(8, 8)], TINY)
    assert (found.device, found.dtype, found.read_size, found.square) == ("cpu", "float32", 1 << 16, 16)
    assert min(found.read, found.copy, found.matmul, *found.model_matmul_ms.values()) > 0
    assert list(found.model_matmul_ms) == ["decode 1", "prefill 32", "decode 8"]


def test_matrices_are_the_merged_ones(folder):
    assert layer_matrices(model(folder)) == [(32, 16), (16, 16), (64, 16), (16, 32)]
    assert sum(o * i for o, i in layer_matrices(model(folder))) == 16 * (16 + 8 + 8) + 16 * 16 + 3 * 16 * 32


def test_says_what_was_measured():
    text = str(Ceilings("cpu", "bfloat16", 70e9, 60e9, 0.8e12, 512 << 20, 2048, {"decode 1": 14.5}))
    assert text == ("read 70.0 GB/s (sum over 512 MiB), copy 60.0 GB/s (read + write), bfloat16 matmul 0.80 TFLOP/s (2048³)\n"
                    "this model's matrices with torch's matmul: decode 1 14.50 ms")  # fmt: skip


def test_the_fastest_of_at_least_three_runs_counts_and_the_warm_up_does_not(monkeypatch):
    times = iter([0.1, 5.0, 3.0, 4.0])
    monkeypatch.setattr("llmkit.bench.ceilings._host_seconds", lambda work, device: next(times))
    assert best_seconds(lambda: None, CPU, budget=0) == 3.0
