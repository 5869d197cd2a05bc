"""A model folder small enough that loading and generating cost nothing: random weights, a tokenizer of 64 words."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 64,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "torch_dtype": "float32",
    "hidden_act": "silu", "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny-model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights(), path / "model.safetensors", {"format": "pt"})
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, **{f"w{i}": i for i in range(1, 64)}}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "w1", "eos_token": "w2", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    return path


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16),
              "self_attn.o_proj": (16, 16), "mlp.gate_proj": (32, 16),
              "mlp.up_proj": (32, 16), "mlp.down_proj": (16, 32)}  # fmt: skip
    tensors = {"model.embed_tokens.weight": torch.randn(64, 16, generator=generator), "model.norm.weight": torch.ones(16)}
    for i in range(2):
        prefix = f"model.layers.{i}."
        tensors |= {f"{prefix}{n}.weight": torch.randn(*s, generator=generator) for n, s in shapes.items()}
        tensors |= {f"{prefix}{n}.weight": torch.ones(16) for n in ("input_layernorm", "post_attention_layernorm")}
    return tensors
