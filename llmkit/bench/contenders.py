"""Who runs the work. One small class each; a new engine is one more class and one more line in `CONTENDERS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmkit.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from llmkit.models.config import ModelConfig


@dataclass(frozen=True)
class Subject:
    """What is measured: one folder of weights, in one dtype, on one device. options: of llmkit's engine, `model` among them.
    static_batch: most requests that an engine without continuous batching gets at once."""

    folder: Path
    model: ModelConfig
    device: torch.device
    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)
    static_batch: int = 32

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def kv_itemsize(self) -> int:
        """Bytes of a number of llmkit's KV cache."""
        return 1 if self.options.get("kv_cache_dtype") == "fp8" else self.dtype.itemsize

    @classmethod
    def of(cls, options: dict[str, Any], static_batch: int = 32) -> Subject:
        """Find the model and choose device and dtype as llmkit would, without loading it."""
        from llmkit import hub
        from llmkit.config import EngineConfig
        from llmkit.engine.start import choose_device, choose_dtype
        from llmkit.models.config import ModelConfig

        config = EngineConfig.from_options(**options)
        folder = hub.resolve(config.model, source=config.source, revision=config.revision, cache_dir=config.download_dir)
        model, device = ModelConfig.from_folder(folder), choose_device(config.device)
        return cls(folder, model, device, choose_dtype(config.dtype, model.dtype, device), options, static_batch)


class Contender(Protocol):
    """An engine, loaded. version: of the library. longest: context in tokens that it was loaded for. max_num_seqs: most
    requests at once."""

    name: str
    version: str
    longest: int
    max_num_seqs: int

    def generate(self, prompts: Sequence[list[int]], output_lens: Sequence[int]) -> list[list[int]]:
        """Continue each prompt greedily by exactly output_lens[i] tokens, never ending early, making no text."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


class Llmkit:
    """llmkit itself, through the public `LLM`."""

    name = "llmkit"

    def __init__(self, subject: Subject) -> None:
        import llmkit

        self.version = llmkit.__version__
        self.llm = llmkit.LLM(**subject.options)
        plan = self.llm.memory_plan()
        self.longest, self.max_num_seqs = plan.max_model_len, plan.max_num_seqs

    def generate(self, prompts: Sequence[list[int]], output_lens: Sequence[int]) -> list[list[int]]:
        from llmkit import SamplingParams

        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in output_lens]
        return [o.outputs[0].token_ids for o in self.llm.generate(list(prompts), params, use_tqdm=False)]

    def close(self) -> None:
        self.llm.close()


class Transformers:
    """transformers' `generate` on static batches: left-padded, in the order given, each batch as long as its longest answer."""

    name = "transformers"

    def __init__(self, subject: Subject) -> None:
        import transformers

        self.version, self.device = transformers.__version__, subject.device
        self.longest, self.max_num_seqs = subject.model.max_position, subject.static_batch
        transformers.utils.logging.disable_progress_bar()
        self.model: Any = self._load(subject).to(subject.device).eval()
        self.model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)  # no eos: none ends early

    @staticmethod
    def _load(subject: Subject) -> Any:
        """The same weights; random ones when llmkit has random ones too."""
        from transformers import AutoConfig, AutoModelForCausalLM

        if subject.options.get("load_format") == "dummy":
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(subject.folder), dtype=subject.dtype)
        return AutoModelForCausalLM.from_pretrained(subject.folder, dtype=subject.dtype)

    def generate(self, prompts: Sequence[list[int]], output_lens: Sequence[int]) -> list[list[int]]:
        answers: list[list[int]] = []
        for start in range(0, len(prompts), self.max_num_seqs):
            part = slice(start, start + self.max_num_seqs)
            answers += [a[:n] for a, n in zip(self._one_batch(prompts[part], max(output_lens[part])), output_lens[part])]
        return answers

    def _one_batch(self, prompts: Sequence[list[int]], length: int) -> list[list[int]]:
        import torch

        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        with torch.inference_mode():
            return self.model.generate(ids, attention_mask=mask, max_new_tokens=length)[:, width:].tolist()

    def close(self) -> None:
        import gc

        on_gpu, self.model = self.device.type == "cuda", None
        gc.collect()
        if on_gpu:
            import torch

            torch.cuda.empty_cache()


CONTENDERS: dict[str, Callable[[Subject], Contender]] = {"llmkit": Llmkit, "transformers": Transformers}


def check_length(contenders: Sequence[Contender], longest: int) -> None:
    """ConfigError when a contender could not hold the longest request."""
    for c in contenders:
        if longest > c.longest:
            raise ConfigError(f"this work needs a context of {longest:,} tokens, {c.name} has {c.longest:,}",
                              "ask for less with --input-len and --output-len, or drop or raise --max-model-len")  # fmt: skip
