"""config.json of every family and spelling, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers

from llmkit.errors import ConfigError, UnsupportedModelError
from llmkit.models.config import ARCHITECTURES, ModelConfig

SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
                         "intermediate_size": 96, "vocab_size": 99, "max_position_embeddings": 512}  # fmt: skip
BASE = {"architectures": ["LlamaForCausalLM"], **SIZES}


def read(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict({k: v for k, v in (BASE | changes).items() if v is not ...})


def of(architecture: str, **changes: Any) -> ModelConfig:
    return read(architectures=[f"{architecture}ForCausalLM"], **changes)


def test_old_and_new_spelling_mean_the_same():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
    new = read(rope_parameters=scaling | {"rope_type": "llama3", "rope_theta": 5e5}, dtype="bfloat16")
    for name in ("rope_type", "type"):
        old = read(rope_theta=5e5, rope_scaling=scaling | {name: "llama3"}, torch_dtype="bfloat16")
        assert (old.rope.theta, old.rope.kind, old.rope.original_max_position) == (5e5, "llama3", 128)
        assert (new.rope.theta, new.rope.kind, new.rope.original_max_position) == (5e5, "llama3", 128)
        assert {k: old.rope.scaling[k] for k in scaling} == {k: new.rope.scaling[k] for k in scaling} == scaling
        assert old.dtype == new.dtype == "bfloat16"


def test_plain_rope_in_both_spellings():
    for changes in ({"rope_theta": 7.5, "rope_scaling": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 7.5}}):
        assert (read(**changes).rope.theta, read(**changes).rope.kind) == (7.5, "default")
    assert read().rope.theta == 10000.0
    assert read(partial_rotary_factor=0.5).rope.dim == 8
    assert of("Phi3", rope_scaling={"type": "su"}).rope.kind == "longrope"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_silent_file_means_what_transformers_means(architecture):
    """Old files leave out what was the default when they were written; transformers fills it in, and so must we."""
    config = getattr(transformers, architecture.replace("ForCausalLM", "Config"))(**SIZES, pad_token_id=None)
    ours = read(architectures=[architecture])
    assert ours.head_dim == (getattr(config, "head_dim", None) or 16)
    assert ours.norm_eps == config.rms_norm_eps
    assert ours.tie_embeddings == config.tie_word_embeddings
    assert ours.rope.theta == config.rope_parameters["rope_theta"]
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * 4
    assert ours.windows == tuple(window if t == "sliding_attention" else None for t in types)
    assert [int(r) for r in ours.rotary_layers] == (getattr(config, "no_rope_layers", None) or [1] * 4)
    defaults = type(config)()
    longest = read(architectures=[architecture], max_position_embeddings=...).max_position
    assert longest == defaults.max_position_embeddings


@pytest.mark.parametrize(
    ("architecture", "changes", "windows"),
    [
        ("Llama", {"sliding_window": 8}, (None,) * 4),
        ("Mistral", {"sliding_window": 8}, (8,) * 4),
        ("Mistral", {"sliding_window": None}, (None,) * 4),
        ("Phi3", {"sliding_window": 8}, (8,) * 4),
        ("Qwen2", {"sliding_window": 8}, (None,) * 4),
        ("Qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 8)),
        ("Qwen3", {"sliding_window": 8, "use_sliding_window": True,
                   "layer_types": ["full_attention", "sliding_attention"] * 2}, (None, 8, None, 8)),
        ("SmolLM3", {"sliding_window": 8, "use_sliding_window": True}, (None, None, None, 8)),
        ("SmolLM3", {"sliding_window": 8, "use_sliding_window": True, "no_rope_layers": [0, 1, 1, 0]}, (8, None, None, 8)),
    ],
)  # fmt: skip
def test_windows(architecture, changes, windows):
    assert of(architecture, **changes).windows == windows


def test_biases_and_norms_of_each_family():
    assert (of("Qwen2").qkv_bias, of("Qwen2").o_bias, of("Qwen2").qk_norm) == (True, False, False)
    assert (of("Qwen3").qkv_bias, of("Qwen3").qk_norm) == (False, True)
    biased = read(attention_bias=True, mlp_bias=True)
    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias) == (True, True, True)
    assert not of("Mistral", attention_bias=True).qkv_bias
    assert of("Phi3").fused_checkpoint


def test_ids_counts_and_sizes():
    config = read(eos_token_id=[2, 7], num_key_value_heads=..., head_dim=None)
    assert (config.eos_token_ids, config.num_kv_heads, config.head_dim) == ((2, 7), 4, 16)
    assert read(eos_token_id=3).eos_token_ids == (3,)
    assert read().eos_token_ids == ()
    assert read().kv_bytes_per_token == 2 * 4 * 2 * 16


def test_number_of_parameters_is_that_of_the_model():
    for tied in (False, True):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied))
        assert read(tie_word_embeddings=tied).num_parameters == model.num_parameters()


def test_a_model_type_is_enough():
    assert read(architectures=None, model_type="qwen3").architecture == "Qwen3ForCausalLM"


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"architectures": ["LlamaForCausaLM"]}, UnsupportedModelError, ["'LlamaForCausaLM'", "LlamaForCausalLM is the nearest"]),
        ({"architectures": ["BertModel"]}, UnsupportedModelError, ["'BertModel'", "llmkit runs", "Qwen3ForCausalLM"]),
        ({"architectures": []}, UnsupportedModelError, ["names no architecture"]),
        ({"architectures": None}, UnsupportedModelError, ["names no architecture"]),
        ({"hidden_size": ...}, ConfigError, ["'hidden_size' is missing"]),
        ({"vocab_size": None}, ConfigError, ["'vocab_size' is missing"]),
        ({"hidden_size": "64"}, ConfigError, ["'hidden_size'", "'64'"]),
        ({"num_hidden_layers": 0}, ConfigError, ["'num_hidden_layers'", "at least 1"]),
        ({"num_hidden_layers": True}, ConfigError, ["'num_hidden_layers'"]),
        ({"intermediate_size": 9.5}, ConfigError, ["'intermediate_size'", "whole"]),
        ({"rms_norm_eps": float("nan")}, ConfigError, ["'rms_norm_eps'"]),
        ({"num_key_value_heads": 3}, ConfigError, ["num_attention_heads 4 is not a multiple of num_key_value_heads 3"]),
        ({"hidden_act": "gelu"}, UnsupportedModelError, ["'gelu'", "silu"]),
        ({"quantization_config": {"quant_method": "awq"}}, UnsupportedModelError, ["awq", "GGUF"]),
    ],
)
def test_refusals_name_the_file_and_the_field(changes, error, words):
    with pytest.raises(error) as caught:
        ModelConfig.from_dict({k: v for k, v in (BASE | changes).items() if v is not ...}, "some/config.json")
    for word in ["some/config.json", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "does not exist"), (b"{", "cannot be read"), (b"[1]", "list, not a JSON object"), (b"\xff\xfe{}", "cannot be read")],
)
def test_a_damaged_file_is_named(tmp_path, content, words):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        ModelConfig.from_folder(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_folder_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    assert ModelConfig.from_folder(tmp_path) == read()
