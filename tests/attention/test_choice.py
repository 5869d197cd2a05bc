"""Who computes attention: what is picked where, and why what was asked for cannot be had."""

from __future__ import annotations

import importlib
import inspect
import types
from typing import Any

import pytest
import torch

from llmkit import LLM, ops
from llmkit.attention import choice as module
from llmkit.attention.choice import Choice, choose, paged_varlen
from llmkit.config import EngineConfig
from llmkit.errors import ConfigError
from llmkit.models.config import ModelConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BF16, F32 = torch.bfloat16, torch.float32
HALF_ROTARY = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


def model(head_dim: int = 64, **changes: Any) -> ModelConfig:
    return ModelConfig.from_dict(
        {"architectures": ["LlamaForCausalLM"], "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
         "head_dim": head_dim, "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 99,
         "max_position_embeddings": 512} | changes
    )  # fmt: skip


@pytest.fixture
def gpu(monkeypatch):
    """Decide as on a GPU with our kernels, in bfloat16 and float16; nothing is run."""
    monkeypatch.setattr(ops, "has_kernels", lambda device, dtype: device.type == "cuda" and dtype is not F32)

    def installed(paged: bool = True, flash: bool = True) -> None:
        monkeypatch.setattr(module, "paged_varlen", lambda: print if paged else None)

        def load(name: str) -> Any:
            if not flash:
                raise ImportError("No module named 'flash_attn'")
            return types.SimpleNamespace(flash_attn_varlen_func=print)

        monkeypatch.setattr(module, "importlib", types.SimpleNamespace(import_module=load))

    installed()
    return installed


def test_on_a_cpu_there_is_torch():
    assert choose("auto", CPU, BF16, model()) == choose("torch", CPU, BF16, model()) == Choice("torch", 16)
    assert choose("auto", CPU, F32, model(), block_size=4).block_size == 4
    assert str(choose("auto", CPU, F32, model())) == "torch"


@pytest.mark.parametrize("asked", ["triton", "flash_attn"])
def test_on_a_cpu_the_others_say_why_not(asked, gpu):
    with pytest.raises(ConfigError, match=rf"'{asked}' cannot work here: our kernels need an NVIDIA GPU.*is cpu"):
        choose(asked, CPU, BF16, model())


def test_deterministic_has_attention_of_its_own_on_a_gpu_and_says_why_not_elsewhere(gpu, dummy_folder):
    assert choose("auto", GPU, BF16, model(), deterministic=True).name == "fixed"
    assert choose("triton", GPU, BF16, model(), 16, deterministic=True).block_size == 16
    for asked in ("torch", "flash_attn"):
        with pytest.raises(ConfigError, match=f"has its own attention, attention_backend='{asked}' cannot be had with it"):
            choose(asked, GPU, BF16, model(), deterministic=True)
    for shape, why in (({"head_dim": 80}, "heads of 32, 64, 128, 256"), ({"attention_bias": True}, "the model adds biases")):
        with pytest.raises(ConfigError, match=f"deterministic=True cannot work here: .*{why}"):
            choose("auto", GPU, BF16, model(**shape), deterministic=True)
    with pytest.raises(ConfigError, match=r"deterministic=True cannot work here: our kernels need an NVIDIA GPU.*is cpu"):
        LLM(dummy_folder, load_format="dummy", skip_tokenizer_init=True, device="cpu", deterministic=True)


def test_on_a_gpu_our_kernels_come_first(gpu):
    assert choose("auto", GPU, BF16, model()) == choose("triton", GPU, BF16, model()) == Choice("triton", 64)
    assert choose("auto", GPU, BF16, model(), block_size=16).block_size == 16


@pytest.mark.parametrize(
    ("dtype", "shape", "why"),
    [
        (F32, {}, "float32"),
        (BF16, {"head_dim": 80}, "32, 64, 128, 256 numbers, the model 80"),
        (BF16, {"rope_parameters": HALF_ROTARY}, "32 of 64 numbers"),
    ],
)
def test_what_our_kernels_cannot_do_torch_does_and_says_so(gpu, dtype, shape, why):
    found = choose("auto", GPU, dtype, model(**shape))
    assert (found.name, found.paged, found.block_size) == ("torch", dtype is BF16, 256 if dtype is BF16 else 16)
    assert why in str(found)
    for asked in ("triton", "flash_attn"):
        with pytest.raises(ConfigError, match=why):
            choose(asked, GPU, dtype, model(**shape))


def test_torch_reads_blocks_in_place_only_where_it_can(gpu):
    assert choose("torch", GPU, BF16, model()) == Choice("torch", 256, paged=True)
    assert choose("torch", GPU, BF16, model(), block_size=512) == Choice("torch", 512, paged=True)
    for block_size, head_dim, why in ((64, 64, "block_size=64"), (None, 12, "heads of 12"), (None, 512, "heads of 512")):
        found = choose("torch", GPU, BF16, model(head_dim), block_size)
        assert (found.paged, found.block_size) == (False, block_size or 16)
        assert why in found.because
    gpu(paged=False)
    assert "reads no block tables" in str(choose("torch", GPU, BF16, model()))


def test_flash_attn_is_used_when_it_is_asked_for_and_there(gpu):
    found = choose("flash_attn", GPU, BF16, model())
    assert found == Choice("flash_attn", 256)
    assert str(found) == "flash_attn for prompts, triton for decoding"
    with pytest.raises(ConfigError, match="multiple of 256 tokens, and block_size=64"):
        choose("flash_attn", GPU, BF16, model(), 64)
    gpu(flash=False)
    with pytest.raises(ConfigError, match=r"flash_attn cannot be imported: No module(.|\n)*pip install flash-attn"):
        choose("flash_attn", GPU, BF16, model())


def test_float8_is_for_our_kernels_and_plain_torch(gpu, monkeypatch):
    def chosen(asked: str = "auto", device: torch.device = GPU, **options: Any) -> Choice:
        return choose(asked, device, BF16, model(), kv_cache_dtype="fp8", **options)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert chosen() == Choice("triton", 64, kv_dtype=torch.float8_e4m3fn)
    assert str(chosen()) == "triton, keys and values in float8"
    assert chosen(deterministic=True).kv_dtype == torch.float8_e4m3fn
    assert chosen(device=CPU) == Choice("torch", 16, kv_dtype=torch.float8_e4m3fn)
    assert (chosen("torch").paged, chosen("torch").block_size) == (False, 16)
    assert "varlen_attn does not read float8" in str(chosen("torch"))
    with pytest.raises(ConfigError, match="kv_cache_dtype='fp8' cannot work here: flash_attn does not read float8"):
        chosen("flash_attn")
    with pytest.raises(ConfigError, match="torch has no float8 on mps"):
        chosen(device=torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ConfigError, match=r"capability 8\.9 or more, this one has 8\.6"):
        chosen()
    assert chosen("torch").kv_dtype == torch.float8_e4m3fn


def test_this_torch_is_recognised():
    varlen = importlib.import_module("torch.nn.attention.varlen")
    has = "block_table" in str(inspect.signature(varlen.varlen_attn))
    assert (paged_varlen() is not None) == has


def test_the_option_reaches_the_engine_and_the_report(dummy_folder):
    small = {"load_format": "dummy", "max_model_len": 64, "kv_cache_memory": 0.01}
    with LLM(dummy_folder, attention_backend="torch", device="cpu", **small) as llm:
        assert llm.startup_report().facts["attention"] == "torch"
        assert llm.config.block_size == llm.memory_plan().block_size == 16
    with pytest.raises(ConfigError, match="attention_backend='triton' cannot work here"):
        LLM(dummy_folder, attention_backend="triton", device="cpu", **small)
    with pytest.raises(ConfigError, match="attention_backend must be one of auto, triton, torch, flash_attn; got 'xformers'"):
        LLM(dummy_folder, attention_backend="xformers")


@pytest.mark.parametrize(("spelled", "means"), [("FLASH_ATTN", "flash_attn"), ("TRITON_ATTN", "triton"), (None, "auto")])
def test_vllms_spellings(spelled, means):
    assert EngineConfig.from_options(attention_backend=spelled).attention_backend == means


def test_describe_names_who_attends():
    assert ops.describe(CPU, F32, "flash_attn").endswith("attention: flash_attn, float32")
