"""From options to a running engine, with the time of each stage."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmkit import ops
from llmkit.attention.choice import choose
from llmkit.config import EngineConfig
from llmkit.engine.engine import Engine
from llmkit.engine.memory import check_room, device_used, plan_memory
from llmkit.engine.shortage import is_shortage
from llmkit.errors import ConfigError, OutOfMemoryError
from llmkit.models.config import ModelConfig, read_json
from llmkit.models.decoder import Decoder
from llmkit.models.reader import fast_reader
from llmkit.models.weights import open_weights
from llmkit.tokenizer import Tokenizer

_DEFAULT_SEQS = {"cpu": 128, "mps": 64, "cuda": 256}
_DEFAULT_BUDGET = {"cpu": 2048, "mps": 2048, "cuda": 8192}


@dataclass
class StartupReport:
    """Seconds of each stage of a start, in order, and what was chosen."""

    stages: dict[str, float] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Seconds in all."""
        return sum(self.stages.values())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        begin = time.perf_counter()
        yield
        self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - begin

    def __str__(self) -> str:
        width = max(map(len, [*self.stages, *self.facts]), default=0)
        lines = [f"ready in {self.total:.2f} s"]
        lines += [f"  {n:<{width}} {s:7.3f} s  {'█' * round(24 * s / self.total)}" for n, s in self.stages.items()]
        return "\n".join(lines + [f"  {name:<{width}} {fact}" for name, fact in self.facts.items()])

    __repr__ = __str__


@dataclass
class Started:
    """A running engine and what belongs to it. generation_config: the model's own sampling defaults (may be empty)."""

    config: EngineConfig
    model_config: ModelConfig
    folder: Path
    tokenizer: Tokenizer
    engine: Engine
    generation_config: dict[str, Any]
    report: StartupReport


def start_engine(config: EngineConfig, report: StartupReport | None = None) -> Started:
    """Resolve, read, load, plan. Every error is typed and names its cause; nothing is left behind on failure.

    The tokenizer is read beside the device's start and the weights; its stage is what is left to wait for after them.
    """
    try:
        return _start(config, report or StartupReport())
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        said = str(error)  # not the error itself: it would keep what was loaded
    raise OutOfMemoryError(f"the device's memory ran out while the engine started: {said}",
                           "close what is not used (llm.close(), other notebooks), or lower gpu_memory_utilization")  # fmt: skip


def _start(config: EngineConfig, report: StartupReport) -> Started:
    from llmkit import hub

    with report.stage("find the model"):
        where = {"source": config.source, "revision": config.revision, "cache_dir": config.download_dir}
        folder = hub.resolve(config.model, **where)
        model_config = ModelConfig.from_folder(folder)
        own = Path(config.tokenizer or folder).expanduser()  # a folder of nothing but a tokenizer is no model, and fine here
        bare = config.skip_tokenizer_init or any(own.glob("tokenizer*"))
        home = own if bare else hub.resolve(config.tokenizer or str(folder), **where)
    with ThreadPoolExecutor(1, "llmkit-tokenizer") as beside:
        reading = beside.submit(_read_tokenizer, home, config)
        with report.stage("device"):
            device = choose_device(config.device)
            dtype = choose_dtype(config.dtype, model_config.dtype, device)
            attention = choose(
                config.attention_backend, device, dtype, model_config, config.block_size, config.deterministic,
                config.kv_cache_dtype,
            )  # fmt: skip
            config = dataclasses.replace(config, block_size=attention.block_size)
            used_before = device_used(device)
            check_room(model_config, dtype, device, used_before)
        if reading.done():
            reading.result()  # a folder without a tokenizer is told before the weights are read
        with report.stage("weights"):
            model = _load(config, model_config, folder, dtype, device, report)
            model.attention = attention
        with report.stage("tokenizer"):
            tokenizer, seconds = reading.result()
        report.facts["tokenizer"] = f"read in {seconds:.2f} s beside the stages before"
    with report.stage("KV cache"):
        engine = _build(config, model, dtype, used_before, tokenizer)
    plain = attention.name == ("torch" if device.type == "cpu" else "triton")
    report.facts |= {"model": str(folder), "runs on": ops.describe(device, dtype, "" if plain else attention.name)}
    report.facts["attention"] = str(attention)
    generation = folder / "generation_config.json"
    defaults = read_json(generation) if generation.exists() else {}
    return Started(config, model_config, folder, tokenizer, engine, defaults, report)


def _read_tokenizer(folder: Path, config: EngineConfig) -> tuple[Tokenizer, float]:
    """The tokenizer, and the seconds that took."""
    begin = time.perf_counter()
    tokenizer = Tokenizer.absent() if config.skip_tokenizer_init else Tokenizer.from_folder(folder, config.trust_remote_code)
    return tokenizer, time.perf_counter() - begin


def choose_device(name: str) -> torch.device:
    """"auto" takes a GPU when there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present[name]:
        raise ConfigError(f"device={name!r} was asked for, but torch sees none", "use device='auto', or check the driver")
    return torch.device(name)


def choose_dtype(asked: str, weights: str, device: torch.device) -> torch.dtype:
    """"auto" keeps the weights' own dtype where the device multiplies it natively, else float32 (CPU) or float16."""
    if asked != "auto":
        return getattr(torch, asked)
    name = weights if weights in ("bfloat16", "float16", "float32") else "bfloat16"
    if device.type == "cpu":
        return torch.bfloat16 if name != "float32" and ops.cpu_supports_bf16() else torch.float32
    if device.type == "cuda" and name != "float16" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float16


def _load(
    config: EngineConfig, model: ModelConfig, folder: Path, dtype: torch.dtype, device: torch.device, report: StartupReport
) -> Decoder:
    weights = open_weights(folder, config.load_format, dtype, config.seed, device)
    longest = min(config.max_model_len or model.max_position, model.max_position)
    try:
        reader = fast_reader(weights, device)
        decoder = Decoder(model, weights, dtype, device, longest, reader)
        if reader:
            reader.run()
            report.facts["weights"] = str(reader)
        return decoder
    finally:
        weights.close()


def _build(config: EngineConfig, model: Decoder, dtype: torch.dtype, used_before: int, tokenizer: Tokenizer) -> Engine:
    longest = model.config.max_position
    if config.max_model_len and config.max_model_len > longest:
        raise ConfigError(f"max_model_len={config.max_model_len} is longer than the model's {longest} positions",
                          f"use max_model_len={longest} or leave it out")  # fmt: skip
    kind = model.device.type
    seqs = config.max_num_seqs or min(_DEFAULT_SEQS[kind], config.max_num_batched_tokens or _DEFAULT_SEQS[kind])
    budget = config.max_num_batched_tokens or max(_DEFAULT_BUDGET[kind], seqs)
    if budget < seqs:
        raise ConfigError(f"max_num_batched_tokens={budget} is less than max_num_seqs={seqs}: a step must hold a token of each",
                          f"use max_num_seqs={budget} or more tokens")  # fmt: skip
    plan = plan_memory(config, model.config, dtype, model.device, model.weight_bytes, seqs, budget, used_before, model.kv_dtype)
    return Engine(
        model,
        plan,
        token_budget=budget,
        short_mixed=config.max_num_batched_tokens is None,
        chunk_limit=config.long_prefill_token_threshold,
        caching=config.enable_prefix_caching,
        by_priority=config.scheduling_policy == "priority",
        enforce_eager=config.enforce_eager,
        token_text=tokenizer.token_text,
    )
