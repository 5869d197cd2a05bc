"""Rotary tables against transformers' own, for every scaling that llmkit has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from llmkit_kernels import reference
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from llmkit.errors import ConfigError, UnsupportedModelError
from llmkit.layers.rotary import RotaryEmbedding, inverse_frequencies
from llmkit.models.config import ModelConfig, RopeConfig

SMALL: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1,
                         "intermediate_size": 32, "vocab_size": 11, "max_position_embeddings": 2048}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 256}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": LLAMA3,
    "llama3 of Llama 3.2": LLAMA3 | {"factor": 32.0, "rope_theta": 500000.0},
    "yarn": YARN,
    "yarn, odd factor": YARN | {"factor": 40.0, "original_max_position_embeddings": 4096, "rope_theta": 1e6},
    "yarn, mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn, attention_factor": YARN | {"attention_factor": 1.25},
    "yarn, betas": YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, untruncated": YARN | {"truncate": False},
    "yarn, shrinking": YARN | {"factor": 0.5},
    "partial linear": {"rope_type": "linear", "factor": 3.0, "partial_rotary_factor": 0.5},
}


def config_of(parameters: dict[str, Any], **changes: Any) -> LlamaConfig:
    return LlamaConfig(**SMALL | {"rope_parameters": {"rope_theta": 10000.0} | parameters} | changes)


def ours(config: Any) -> RopeConfig:
    return ModelConfig.from_dict(config.to_dict()).rope


def assert_same(config: Any, max_len: int = 2048) -> None:
    kind = config.rope_parameters["rope_type"]
    expected, expected_factor = ROPE_INIT_FUNCTIONS[kind](config, seq_len=max_len)
    got, factor = inverse_frequencies(ours(config), max_len)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-9)


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_and_factor(name):
    assert_same(config_of(SCALINGS[name]))


@pytest.mark.parametrize("given", [{}, {"factor": 16.0}, {"attention_factor": 1.1}])
@pytest.mark.parametrize("max_len", [100, 4096, 4097, 8000])  # short factors up to the original length, long ones beyond
def test_longrope(given, max_len):
    factors = {"short_factor": [1.0 + i / 9 for i in range(16)], "long_factor": [2.0 + i for i in range(16)]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors, **given}
    sizes = SMALL | {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    assert_same(Phi3Config(**sizes, pad_token_id=None, architectures=["Phi3ForCausalLM"], rope_parameters=rope), max_len)


@pytest.mark.parametrize("parameters", [{"rope_type": "default"}, *SCALINGS.values()], ids=["default", *SCALINGS])
def test_tables_turn_queries_as_transformers_does(parameters):
    config = config_of(parameters)
    positions = torch.tensor([0, 1, 2, 77, 511, 512, 2047])
    q = torch.randn(len(positions), 2, 32)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    rotated = cos.shape[-1]
    expected, _ = apply_rotary_pos_emb(q.transpose(0, 1)[None, ..., :rotated], q.transpose(0, 1)[None, ..., :rotated], cos, sin)
    table = RotaryEmbedding(ours(config), 2048, torch.float32, torch.device("cpu"))
    got = reference.rotate(q, *table.at(positions))
    torch.testing.assert_close(got[..., :rotated], expected[0].transpose(0, 1), atol=2e-4, rtol=1e-4)  # angles reach 2047 radians
    assert torch.equal(got[..., rotated:], q[..., rotated:])


def test_an_unknown_scaling_is_refused_by_name():
    rope = RopeConfig(10000.0, 8, "dynamic", {"factor": 2.0}, 128)
    with pytest.raises(UnsupportedModelError, match=r"'dynamic' is not supported[\s\S]*llama3"):
        inverse_frequencies(rope, 128)


def test_a_missing_field_is_named():
    with pytest.raises(ConfigError, match=r"'llama3' needs the field 'low_freq_factor'"):
        inverse_frequencies(RopeConfig(10000.0, 8, "llama3", {"factor": 2.0}, 128), 128)
