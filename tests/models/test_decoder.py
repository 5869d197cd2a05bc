"""The decoder against transformers, straight from the checkpoint: logits of whole prompts, and what a wrong checkpoint says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmkit.engine.batch import build_batch
from llmkit.engine.request import Request
from llmkit.engine.rows import Rows
from llmkit.engine.runner import Runner
from llmkit.errors import UnsupportedModelError, WeightsError
from llmkit.models.config import ModelConfig
from llmkit.models.decoder import Decoder
from llmkit.models.weights import open_weights
from llmkit.sampling_params import SamplingParams

FAMILIES = ["llama", "llama-bias-tied", "llama-llama3-rope", "llama-yarn", "mistral-window", "qwen2", "qwen2-window",
            "qwen2-layer-types", "qwen3", "smollm3", "smollm3-window", "phi3", "phi3-partial-window"]  # fmt: skip
SIZE, MAX_LEN = 16, 128


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    weights = open_weights(folder)
    try:
        return Decoder(ModelConfig.from_folder(folder), weights, dtype, torch.device("cpu"), MAX_LEN)
    finally:
        weights.close()


@torch.inference_mode()
def logits_of(model: Decoder, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Logits at every position of each prompt, all prompts in one step."""
    rows, next_block = Rows(len(prompts), MAX_LEN, SIZE), 1
    for prompt in prompts:
        row = rows.take(Request("r", np.array(prompt, np.int32), SamplingParams(), max_total=MAX_LEN))
        count = -(-len(prompt) // SIZE)
        rows.add_blocks(row, list(range(next_block, next_block + count)))
        next_block += count
    lengths = np.array([len(p) for p in prompts], np.int32)
    runner = Runner(model, rows, next_block, int(lengths.sum()))
    hidden = runner._forward(build_batch(rows, np.arange(len(prompts)), lengths, 0))
    return list(model.logits(hidden).split(lengths.tolist()))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_whole_prompts(family, tiny):
    folder, theirs = tiny(family)
    random = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 131, (n,), generator=random).tolist() for n in (100, 2, 16, 37)]
    for prompt, got in zip(prompts, logits_of(load(folder), prompts)):
        with torch.inference_mode():
            expected = theirs(torch.tensor([prompt])).logits[0]
        assert expected.std() > 0.5, "logits without contrast would show nothing"
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_bfloat16_stays_near_float32(tiny):
    folder, _ = tiny("llama")
    prompt = list(range(3, 63))
    exact, rounded = (logits_of(load(folder, d), [prompt])[0] for d in (torch.float32, torch.bfloat16))
    assert rounded.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=-1).min() > 0.99


@pytest.mark.parametrize("family", ["llama", "llama-bias-tied", "qwen3", "phi3"])
def test_weights_are_counted_once_and_tied_ones_shared(family, tiny):
    folder, theirs = tiny(family)
    assert load(folder).weight_bytes == 4 * theirs.num_parameters()
    assert load(folder, torch.bfloat16).weight_bytes == 2 * theirs.num_parameters()


def test_a_checkpoint_without_an_output_matrix_uses_the_embedding(tiny, tmp_path):
    folder, _ = tiny("llama")
    copy_of(folder, tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    model = load(tmp_path)
    hidden = torch.randn(2, 48)
    torch.testing.assert_close(model.logits(hidden), hidden @ model.embedding.weight.T)


def copy_of(folder: Path, target: Path, change) -> None:
    """A copy of a tiny model with `change` applied to its dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.embed_tokens.weight"),
        ("llama", "model.layers.1.self_attn.k_proj.weight"),
        ("llama-bias-tied", "model.layers.2.mlp.up_proj.bias"),
        ("qwen2", "model.layers.0.self_attn.v_proj.bias"),
        ("qwen3", "model.layers.0.self_attn.q_norm.weight"),
        ("phi3", "model.layers.2.mlp.gate_up_proj.weight"),
        ("mistral-window", "model.norm.weight"),
    ],
)
def test_a_missing_or_misshapen_tensor_is_named(family, name, tiny, tmp_path):
    folder, _ = tiny(family)
    copy_of(folder, tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(WeightsError) as caught:
        load(tmp_path)
    assert name in str(caught.value)
    assert str(tmp_path) in str(caught.value)

    copy_of(folder, tmp_path, lambda tensors: tensors.update({name: torch.zeros(5, 5)}))
    with pytest.raises(WeightsError) as caught:
        load(tmp_path)
    for words in (name, "[5, 5]", str(tmp_path)):
        assert words in str(caught.value)


def test_sizes_in_config_that_do_not_fit_the_file_are_refused(tiny, tmp_path):
    folder, _ = tiny("qwen2")
    copy_of(folder, tmp_path, lambda tensors: None)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 81}))
    with pytest.raises(WeightsError, match=r"mlp\.gate_proj\.weight"):
        load(tmp_path)


def test_an_unknown_rope_scaling_is_refused_at_load(tiny, tmp_path):
    folder, _ = tiny("llama")
    copy_of(folder, tmp_path, lambda tensors: None)
    config = json.loads((tmp_path / "config.json").read_text())
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_parameters": scaling}))
    with pytest.raises(UnsupportedModelError, match="'dynamic' is not supported"):
        load(tmp_path)
