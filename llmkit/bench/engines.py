"""Whose engine does a suite's work: llmkit's, or that of vLLM, whose words llmkit speaks, so that the same rows measure both.

vLLM runs as its own defaults have it, in the process that it starts for itself; it is told what llmkit is told.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from types import ModuleType
from typing import Any

import llmkit
from llmkit.config import EngineConfig
from llmkit.errors import ConfigError

OURS, OTHERS = "llmkit", ("vllm",)
LOAD_SECONDS = {"vllm": 90}  # to load an engine, on an H200 with nothing compiled; llmkit's is in its rows' own time
_SHARED = ("model", "load_format", "skip_tokenizer_init", "max_model_len", "dtype", "kv_cache_dtype", "seed", "enforce_eager",
           "gpu_memory_utilization", "quantization", "enable_prefix_caching", "max_num_seqs",
           "max_num_batched_tokens")  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """An engine. words: the package with its `SamplingParams`. most_at_once: requests of a step. itemsizes: bytes of a weight's
    number, and of a key's."""

    llm: Any
    words: ModuleType
    most_at_once: int
    itemsizes: tuple[int, int]


def check(names: tuple[str, ...], options: dict[str, Any]) -> None:
    """ConfigError where one of these packages is not there, or has no such option: its work would not be the same."""
    for name in names:
        try:
            version(name)
        except PackageNotFoundError as e:
            raise ConfigError(f"--against {name}: it is not installed in this environment", f"pip install {name}") from e
        for option in options:
            if option not in _SHARED:
                flag = f"--{option.replace('_', '-')}"
                raise ConfigError(f"--against {name}: it cannot be told {flag}, so its work would be other", f"drop {flag}")


def known_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """As the package is told them: llmkit's share of a GPU's memory goes for all."""
    return options if name == OURS else {"gpu_memory_utilization": EngineConfig.gpu_memory_utilization} | options


def version(name: str) -> str:
    """Of the package."""
    return llmkit.__version__ if name == OURS else importlib.metadata.version(name)


@contextmanager
def load(name: str, options: dict[str, Any]) -> Iterator[Loaded]:
    """Load the package's engine; its memory is given back at the end."""
    words = importlib.import_module(name)
    llm = words.LLM(**known_options(name, options))
    try:
        yield _ours(llm, words) if name == OURS else _vllm(llm, words)
    finally:
        if name == OURS:
            llm.close()
        else:
            llm.llm_engine.engine_core.shutdown()


def _ours(llm: Any, words: ModuleType) -> Loaded:
    model = llm._engine.model
    return Loaded(llm, words, llm.memory_plan().max_num_seqs, (model.dtype.itemsize, model.kv_dtype.itemsize))


def _vllm(llm: Any, words: ModuleType) -> Loaded:
    config = llm.llm_engine.vllm_config
    size = config.model_config.dtype.itemsize
    weight = 1 if config.model_config.quantization == "fp8" else size
    key = 1 if str(config.cache_config.cache_dtype).startswith("fp8") else size
    return Loaded(llm, words, config.scheduler_config.max_num_seqs, (weight, key))
