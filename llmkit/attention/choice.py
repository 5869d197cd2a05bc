"""Who computes attention: picked once, at the start, from what is asked, what is installed, and what the model needs."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llmkit import ops
from llmkit.errors import ConfigError
from llmkit.models.config import ModelConfig

HEAD_SIZES = (32, 64, 128, 256)  # those of our kernels
PAGE = 256  # flash attention, torch's and its own, reads pages of a multiple of so many tokens
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Choice:
    """name: as of attention_backend=. paged: torch reads the blocks where they lie (varlen_attn) instead of gathering them.
    block_size: tokens per KV block. because: what decided, for the start-up report. kv_dtype: of the KV cache, None: the
    model's."""

    name: str
    block_size: int
    paged: bool = False
    because: str = ""
    kv_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        what = {"flash_attn": "flash_attn for prompts, triton for decoding"}.get(self.name, self.name)
        what += " varlen_attn over blocks" if self.paged else ""
        what += ", keys and values in float8" if self.kv_dtype else ""
        return f"{what} ({self.because})" if self.because else what


def choose(
    asked: str,
    device: torch.device,
    dtype: torch.dtype,
    model: ModelConfig,
    block_size: int | None = None,
    deterministic: bool = False,
    kv_cache_dtype: str = "auto",
) -> Choice:
    """asked: triton, torch, flash_attn, or auto for the best there is. deterministic: the one whose bits never depend on the
    batch. ConfigError says why what was asked for cannot work here. block_size: as the user gave it."""
    if kv_cache_dtype == "fp8":
        return _float8(asked, device, dtype, model, block_size, deterministic)
    no_triton = _no_triton(device, dtype, model)
    if deterministic:
        return _fixed(asked, no_triton, model, block_size)
    if asked == "triton" and no_triton:
        raise ConfigError(f"attention_backend='triton' cannot work here: {no_triton}", "use attention_backend='auto' or 'torch'")
    if asked == "flash_attn":
        return _flash(no_triton, block_size)
    if asked == "torch" or no_triton:
        return _torch(device, dtype, model, block_size, "" if asked == "torch" or device.type == "cpu" else no_triton)
    return Choice("triton", block_size or 64)


def _float8(
    asked: str, device: torch.device, dtype: torch.dtype, model: ModelConfig, block_size: int | None, deterministic: bool
) -> Choice:
    """Keys and values in float8 e4m3, which our kernels and plain torch read; flash attention, torch's and its own, does not."""
    if asked == "flash_attn":
        raise ConfigError("kv_cache_dtype='fp8' cannot work here: flash_attn does not read float8", "drop one of the two")
    plain = choose(asked, device, dtype, model, block_size, deterministic)
    if why := _no_float8(plain.name, device):
        other = " or use attention_backend='torch'" if plain.name == "triton" else ""
        raise ConfigError(f"kv_cache_dtype='fp8' cannot work here: {why}",
                          f"drop the option, and the cache has the model's dtype;{other}".rstrip(";"))  # fmt: skip
    if plain.paged:
        because = filter(None, (plain.because, "blocks are gathered: varlen_attn does not read float8"))
        plain = Choice("torch", block_size or 16, because="; ".join(because))
    return dataclasses.replace(plain, kv_dtype=torch.float8_e4m3fn)


def _no_float8(name: str, device: torch.device) -> str:
    """Why this attention cannot read it; empty when it can."""
    if name == "torch":
        return "torch has no float8 on mps" if device.type == "mps" else ""
    major, minor = torch.cuda.get_device_capability(device)
    return "" if 10 * major + minor >= 89 else f"it needs a GPU of compute capability 8.9 or more, this one has {major}.{minor}"


def _fixed(asked: str, no_triton: str, model: ModelConfig, block_size: int | None) -> Choice:
    if asked not in ("auto", "triton"):
        raise ConfigError(f"deterministic=True has its own attention, attention_backend={asked!r} cannot be had with it",
                          "drop one of the two")  # fmt: skip
    biased = "the model adds biases where our fused kernels add none" if model.o_bias or model.mlp_bias else ""
    if why := no_triton or biased:
        raise ConfigError(f"deterministic=True cannot work here: {why}",
                          "drop the option; with seeds, runs of the same requests in the same order mostly repeat")  # fmt: skip
    return Choice("fixed", block_size or 64, because="deterministic")


def _flash(no_triton: str, block_size: int | None) -> Choice:
    """Prompts by flash_attn; decoding stays with our kernels, so what they need is needed."""
    try:
        flash_attention()
        why = no_triton or _no_pages(block_size)
    except ImportError as error:
        why = f"flash_attn cannot be imported: {error}"
    if why:
        raise ConfigError(f"attention_backend='flash_attn' cannot work here: {why}",
                          "use attention_backend='auto'; `pip install flash-attn` compiles it, which takes hours")  # fmt: skip
    return Choice("flash_attn", block_size or PAGE)


def _torch(device: torch.device, dtype: torch.dtype, model: ModelConfig, block_size: int | None, because: str) -> Choice:
    if device.type != "cuda":
        return Choice("torch", block_size or 16)
    no_pages = _no_varlen(dtype, model) or _no_pages(block_size)
    if no_pages:
        return Choice("torch", block_size or 16, because="; ".join(filter(None, (because, f"blocks are gathered: {no_pages}"))))
    return Choice("torch", block_size or PAGE, paged=True, because=because)


def _no_triton(device: torch.device, dtype: torch.dtype, model: ModelConfig) -> str:
    """Why our kernels cannot attend; empty when they can."""
    if not ops.has_kernels(device, dtype):
        name = str(dtype).removeprefix("torch.")
        return f"our kernels need an NVIDIA GPU of compute capability 8 or more and bfloat16 or float16; this is {device}, {name}"
    if model.head_dim not in HEAD_SIZES:
        return f"our kernels have heads of {', '.join(map(str, HEAD_SIZES))} numbers, the model {model.head_dim}"
    return "" if model.rope.dim == model.head_dim else f"the model rotates {model.rope.dim} of {model.head_dim} numbers of a head"


def _no_varlen(dtype: torch.dtype, model: ModelConfig) -> str:
    """Why torch's varlen_attn cannot read our blocks, leaving their size aside."""
    if dtype not in _HALVES:
        return f"varlen_attn needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if model.head_dim > 256 or model.head_dim % 8:
        return f"varlen_attn has no heads of {model.head_dim} numbers"
    return "" if paged_varlen() else f"varlen_attn of torch {torch.__version__} reads no block tables"


def _no_pages(block_size: int | None) -> str:
    fits = block_size is None or block_size % PAGE == 0
    return "" if fits else f"it reads blocks of a multiple of {PAGE} tokens, and block_size={block_size}"


@functools.cache
def paged_varlen() -> Callable[..., Any] | None:
    """torch's varlen_attn where it takes a block table (2.13 does, 2.11 does not), else None."""
    try:
        varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    return varlen if {"block_table", "seqused_k", "enable_gqa"} <= inspect.signature(varlen).parameters.keys() else None


def flash_attention() -> Callable[..., Any]:
    """flash_attn's function for ragged prompts over blocks; ImportError where it is not there or does not fit this torch."""
    return importlib.import_module("flash_attn").flash_attn_varlen_func
