"""Whose engine does a suite's work: llmkit's, or that of vLLM, whose words llmkit speaks, so that the same rows measure both.

vLLM runs as its own defaults have it, in the process that it starts for itself; what only llmkit has an option for is not passed.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from llmkit.errors import ConfigError

OURS, OTHERS = "llmkit", ("vllm",)
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


def check_installed(names: tuple[str, ...]) -> None:
    """ConfigError where one of these packages is not there."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"--against {name}: it is not installed in this environment", f"pip install {name}")


def known_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Those that the package has, too; llmkit's share of a GPU's memory goes for all."""
    if name == OURS:
        return options
    return {"gpu_memory_utilization": 0.9} | {k: v for k, v in options.items() if k in _SHARED}


def version(name: str) -> str:
    """Of the package."""
    return importlib.import_module(name).__version__


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
        del llm
        gc.collect()


def _ours(llm: Any, words: ModuleType) -> Loaded:
    model = llm._engine.model
    return Loaded(llm, words, llm.memory_plan().max_num_seqs, (model.dtype.itemsize, model.kv_dtype.itemsize))


def _vllm(llm: Any, words: ModuleType) -> Loaded:
    config = llm.llm_engine.vllm_config
    size = config.model_config.dtype.itemsize
    narrow = str(config.cache_config.cache_dtype).startswith("fp8")
    return Loaded(llm, words, config.scheduler_config.max_num_seqs, (size, 1 if narrow else size))
