"""The arithmetic of the limits, against sums written out and against figures known from elsewhere."""

import dataclasses
import json

import pytest

from llmkit.bench.limits import Limits, ModelCost, Need
from llmkit.bench.workload import Workload, fixed
from llmkit.models.config import ModelConfig

QWEN2_7B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
COST = ModelCost(body=1000, head=100, itemsize=2, kv_size=8, attention_size=4, windows=((None, 2), (3, 1)), kv_itemsize=2)


def test_qwen2_7b_reads_what_it_is_known_to_read():
    cost = ModelCost.of(ModelConfig.from_dict(QWEN2_7B), 2)
    assert cost.weight_bytes / 1e9 == pytest.approx(14.14, abs=0.005)
    assert cost.kv_bytes(1) == 28 * 2 * 4 * 128 * 2
    assert 1e3 * Limits(cost, 3.13e12, 756e12).decode([1]).seconds == pytest.approx(4.52, abs=0.005)
    assert 8192 / Limits(cost, 3.13e12, 756e12).prefill([8192]).seconds == pytest.approx(53_600, rel=0.05)


def test_a_tied_embedding_is_read_as_output_matrix_and_an_untied_one_is_only_looked_up():
    tied = ModelCost.of(ModelConfig.from_dict(QWEN2_7B | {"tie_word_embeddings": True}), 2)
    assert tied == ModelCost.of(ModelConfig.from_dict(QWEN2_7B), 2)


def test_parameters_of_the_tiny_model(folder):
    config = ModelConfig.from_dict(json.loads((folder / "config.json").read_text()))
    cost = ModelCost.of(config, 4)
    layer = 16 * 16 + 2 * 8 * 16 + 16 * 16 + 3 * 16 * 32 + 2 * 16
    assert (cost.body, cost.head) == (2 * layer + 16, 64 * 16)
    assert cost.windows == ((None, 2),)


def test_keys_and_values_stop_growing_at_the_window():
    assert [COST.kv_bytes(c) for c in (1, 3, 5)] == [8 * 2 * (2 * c + min(c, 3)) for c in (1, 3, 5)]
    assert COST.decode_flops(5) == 2 * 1100 + 4 * 4 * (2 * 5 + 3)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
def test_prefill_is_the_sum_over_its_tokens(length):
    each = [4 * 4 * (2 * c + min(c, 3)) for c in range(1, length + 1)]
    assert COST.prefill_flops(length) == 2 * 1000 * length + 2 * 100 + sum(each)


def test_a_step_takes_the_slower_of_reading_and_multiplying_and_the_kv_on_top():
    kv = sum(COST.kv_bytes(c) for c in (4, 6))
    flops = sum(COST.decode_flops(c) for c in (4, 6))
    slow_memory, slow_math = Limits(COST, 10.0, 1e9), Limits(COST, 1e9, 10.0)
    assert slow_memory.decode([4, 6]) == Need(flops, 2200 + kv, 220 + kv / 10)
    assert slow_math.decode([4, 6]).seconds == pytest.approx(flops / 10)
    assert slow_math.prefill([4, 6]).seconds == pytest.approx((COST.prefill_flops(4) + COST.prefill_flops(6)) / 10)


def test_a_workload_is_its_prefill_and_its_steps():
    limits = Limits(COST, 100.0, 1000.0)
    work = Workload("w", (4, 7), (3, 2))
    parts = [limits.prefill((4, 7)), limits.decode([5, 8]), limits.decode([6])]  # the first tokens come from the prefill
    need = limits.workload(work, max_num_seqs=8)
    for name in ("flops", "bytes", "seconds"):
        assert getattr(need, name) == pytest.approx(sum(getattr(p, name) for p in parts))


def test_with_fewer_places_the_weights_are_read_more_often():
    limits = Limits(COST, 100.0, 1e9)
    work = fixed(4, 5, 6)
    wide, narrow = limits.workload(work, 4), limits.workload(work, 2)
    assert narrow.bytes - wide.bytes == 5 * COST.weight_bytes
    assert narrow.flops == wide.flops
    assert limits.workload(fixed(4, 5, 1), 4) == limits.prefill((5,) * 4)


def test_every_token_is_multiplied_once():
    """Without attention: 2 · body · (tokens that went in) + 2 · head · (tokens that came out)."""
    cost = dataclasses.replace(COST, attention_size=0)
    work = Workload("w", (9, 3, 5), (4, 8, 1))
    fed = work.num_input + work.num_output - 3  # the last token of each request is never fed back
    assert Limits(cost, 1.0, 1.0).workload(work, 2).flops == 2 * 1000 * fed + 2 * 100 * work.num_output
