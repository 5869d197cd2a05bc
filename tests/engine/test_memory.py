"""The memory plan: sizes by the formula, shrinking with a note, and an error that carries the plan."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit import LLM, SamplingParams
from llmkit.config import EngineConfig
from llmkit.engine import memory, runner
from llmkit.engine.memory import GiB, MemoryPlan, kv_block_bytes, plan_memory
from llmkit.errors import OutOfMemoryError
from llmkit.models.config import ModelConfig

CPU = torch.device("cpu")
MODEL = ModelConfig.from_dict(
    {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 6, "head_dim": 8,
     "num_key_value_heads": 3, "intermediate_size": 96, "vocab_size": 99, "max_position_embeddings": 512}
)  # fmt: skip


def plan(total: int = 8 * GiB, weights: int = 0, before: int = 0, seqs: int = 4, **options: Any) -> MemoryPlan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "device_total", lambda device: total)
        return plan_memory(EngineConfig(**options), MODEL, torch.float32, CPU, weights, seqs, 64, before)


@settings(max_examples=50)
@given(st.integers(1, 64), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_a_block_is_keys_and_values_of_all_layers(block_size, dtype):
    itemsize = torch.empty(0, dtype=dtype).element_size()
    assert kv_block_bytes(MODEL, block_size, dtype) == 2 * 5 * 3 * 8 * block_size * itemsize


def test_with_room_for_all_the_pool_holds_every_request_to_its_end():
    found = plan()
    assert (found.max_model_len, found.notes) == (512, [])
    assert found.num_blocks == 4 * 512 // 16 + 1
    assert found.kv_tokens == 4 * 512
    assert found.kv_cache == found.num_blocks * found.block_bytes
    assert sum(found.parts().values()) == found.total


def test_parts_sum_up_and_the_text_names_them():
    found = plan(weights=GiB, before=2 * GiB)
    parts = found.parts()
    assert (parts["weights"], parts["other processes"]) == (GiB, 2 * GiB)
    assert sum(parts.values()) == found.total == 8 * GiB
    text = str(found)
    for words in (*parts, "128 blocks of 16 tokens = 2,048 tokens", "4.0 requests"):
        assert words in text


def test_the_cache_of_a_real_engine_has_the_planned_size(tiny, smollm2_folder):
    folder, model = tiny("qwen3")
    with LLM(folder, tokenizer=smollm2_folder, dtype="float32", num_kv_blocks=9, block_size=4) as llm:
        found, cache = llm.memory_plan(), llm._engine.runner.kv_cache
        assert cache.numel() * cache.element_size() == found.kv_cache
        assert found.weights == 4 * model.num_parameters()
        assert found.max_model_len == 32
        assert "shrunk from 512 to 32" in found.notes[0]
        assert "shrunk" in str(found)
        answer = llm.generate([[5] * 20], SamplingParams(temperature=0, ignore_eos=True), use_tqdm=False)[0].outputs[0]
        assert (len(answer.token_ids), answer.finish_reason) == (12, "length")  # to the very end of the context


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({"num_kv_blocks": 17}, 17),
        ({"kv_cache_memory": 20 * 15360 / GiB}, 20),
        ({"total": 60 * 15360, "before": 9 * 15360, "weights": 10 * 15360}, None),
    ],
)
def test_a_small_cache_shrinks_the_context_and_says_so(options, blocks):
    assert kv_block_bytes(MODEL, 16, torch.float32) == 15360
    found = plan(**options)
    if blocks is None:
        left = found.total - found.others - found.weights - found.activations
        blocks = int(left * 0.5) // 15360
    assert found.num_blocks == blocks
    assert found.max_model_len == found.kv_tokens == (blocks - 1) * 16
    assert found.notes == [f"max_model_len was shrunk from 512 to {(blocks - 1) * 16} tokens, which is what fits"]


@pytest.mark.parametrize(
    "options",
    [
        {"kv_cache_memory": 0.0},
        {"kv_cache_memory": 1.9 * 15360 / GiB},  # one block, and that is for padding
        {"total": GiB, "weights": GiB},
        {"total": GiB, "before": 2 * GiB},
    ],
)
def test_when_nothing_fits_the_error_carries_the_plan_and_three_fixes(options):
    with pytest.raises(OutOfMemoryError) as caught:
        plan(**options)
    text = str(caught.value)
    fixes = ("max_model_len=256", "max_num_seqs=2", "dtype='bfloat16'")
    for words in ("no room for a KV cache", "memory on cpu", "weights", "other processes", *fixes):
        assert words in text
    assert " -" not in caught.value.message  # no negative counts
    assert isinstance(caught.value, MemoryError)


def on_a_gpu(share: float, before: int, total: int = 4 << 20, weights: int = 1 << 19) -> MemoryPlan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "device_total", lambda device: total)
        config = EngineConfig(gpu_memory_utilization=share)
        return plan_memory(config, MODEL, torch.float32, torch.device("cuda"), weights, 8, 64, before)


@pytest.mark.parametrize("share", [0.5, 0.75, 0.9])
def test_a_gpu_gives_its_share(share):
    """On a GPU an engine takes gpu_memory_utilization of the whole device: weights, activations and the cache, all in all."""
    found = on_a_gpu(share, before=1 << 18)
    own = found.weights + found.activations
    assert found.num_blocks == int((found.total * share - own) // 15360)
    assert own + found.kv_cache <= share * found.total
    assert not [n for n in found.notes if "utilization" in n]


def test_two_engines_share_a_gpu_by_their_fractions():
    first = on_a_gpu(0.45, before=1 << 17)
    held = first.others + first.weights + first.activations + first.kv_cache
    second = on_a_gpu(0.45, before=held)
    assert second.kv_cache == first.kv_cache
    assert held + second.weights + second.activations + second.kv_cache <= second.total


def test_what_others_hold_is_left_to_them_and_said():
    found = on_a_gpu(0.9, before=2 << 20)
    own = found.weights + found.activations
    assert found.num_blocks == int((2 << 20) * 0.97 - own) // 15360
    assert "gpu_memory_utilization=0.9 is 0.0 GiB, of which 0.0 GiB are free: others hold 0.0 GiB" in found.notes[0]
    with pytest.raises(OutOfMemoryError, match="others hold"):
        on_a_gpu(0.9, before=(4 << 20) - (1 << 19))


def test_weights_that_do_not_fit_are_refused_before_they_are_read():
    need = MODEL.num_parameters * 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "device_total", lambda device: 10 * GiB)
        memory.check_room(MODEL, torch.float32, torch.device("cuda"), 10 * GiB - need)
        with pytest.raises(OutOfMemoryError, match=r"need 0\.0 GiB in float32, and 0\.0 GiB of cuda are free: 10\.0 GiB"):
            memory.check_room(MODEL, torch.float32, torch.device("cuda"), 10 * GiB - need + 1)
        memory.check_room(MODEL, torch.float32, CPU, 10 * GiB)  # a CPU has swap and a page cache: it finds out by itself


def test_memory_that_runs_out_while_loading_is_typed_and_kept_by_nobody(dummy_folder, monkeypatch):
    import weakref

    held = []

    def fails(*args: Any) -> None:
        loaded = torch.zeros(10)
        held.append(weakref.ref(loaded))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    monkeypatch.setattr("llmkit.engine.start._load", fails)
    with pytest.raises(OutOfMemoryError, match=r"the engine started: CUDA out of memory\. (.|\n)*gpu_memory") as caught:
        LLM(dummy_folder, load_format="dummy")
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert held[0]() is None


def test_what_deterministic_steps_keep_aside_is_planned(monkeypatch):
    pytest.importorskip("triton", reason="triton comes with torch's CUDA builds; without it there are no kernels")
    from llmkit_kernels.fixed_attention import scratch_bytes

    monkeypatch.setattr(memory.ops, "has_kernels", lambda device, dtype: True)
    usual, fixed = plan(max_model_len=512, block_size=64), plan(max_model_len=512, block_size=64, deterministic=True)
    assert fixed.activations - usual.activations == scratch_bytes(4, 6, 3, 8, 512) == 0, "a single chunk needs none"
    usual, fixed = plan(max_model_len=4096, block_size=64), plan(max_model_len=4096, block_size=64, deterministic=True)
    assert fixed.activations - usual.activations == 4 * 8 * 6 * (8 + 2) * 4


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory is really there")
def test_a_block_of_the_cache_costs_no_more_memory_than_it_has():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    cache, before = runner._zeros((60, 8 << 20), torch.uint8, CPU), resident()
    cache[:, 4096 : 4096 + 6144] = 1
    assert resident() - before < 2 << 20
    assert cache[:, :4096].max() == 0
    assert cache.sum() == 60 * 6144


def test_a_cache_that_the_system_refuses_is_our_error():
    with pytest.raises(OutOfMemoryError, match="no room for a KV cache of 1,073,741,824"):
        runner._zeros((1 << 60,), torch.uint8, CPU)
