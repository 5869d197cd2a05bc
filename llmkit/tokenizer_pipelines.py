"""Pipelines of tokenizer classes: what transformers builds around the vocabulary of a tokenizer.json, built without it.

Some classes of transformers take normalizer, pre-tokenizer and decoder as the file has them; others build them anew, and then the
ids differ from the file's. `fit_to_class` does the same for the classes that most models name. The class files and the registry
(`models/auto/tokenization_auto.py`) of transformers 5 are the source; tests hold both against each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# transformers' registry says "take tokenizer.json as it is" for these, whatever class tokenizer_config.json names
_AS_IS_MODEL_TYPES = {"mistral", "mixtral", "phi3", "granite", "olmo2", "glm4"}
_AS_IS_CLASSES = {"PreTrainedTokenizer", "TokenizersBackend"}  # less the suffix "Fast"
_END = "<|endoftext|>"
_CLASS_DEFAULTS: dict[str, dict[str, str]] = {  # special tokens that a class has when the folder is silent
    "Qwen2Tokenizer": {"unk_token": _END, "eos_token": _END, "pad_token": _END},
    "GPT2Tokenizer": {"unk_token": _END, "bos_token": _END, "eos_token": _END},
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "GemmaTokenizer": {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
                       "mask_token": "<mask>"},
}  # fmt: skip


def fit_to_class(rust: tokenizers.Tokenizer, config: dict[str, Any]) -> bool:
    """Give `rust`, as tokenizer.json has it, the pipeline of its class in transformers, and `config` the class's special tokens.

    config: tokenizer_config.json with config.json's model_type. False, and both as before, for a class that is not known here.
    """
    if _keeps_file(rust, config):
        return True
    if not _rebuild(rust, config):
        return False
    for name, text in _CLASS_DEFAULTS[_class_name(config)].items():
        config.setdefault(name, text)
    return True


def steps_of(part: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a stage of a pipeline, as their JSON in tokenizer.json. key: where a sequence has them, such as "decoders"."""
    state = None if part is None else json.loads(part.__getstate__())
    return [] if state is None else state.get(key, [state])


def _keeps_file(rust: tokenizers.Tokenizer, config: dict[str, Any]) -> bool:
    """Whether the class that transformers would take leaves the file's own pipeline as it is."""
    name = _class_name(config)
    if name in _AS_IS_CLASSES or (not name and config["model_type"] in (None, "llama")):
        return True
    return name == "LlamaTokenizer" and any(step["type"] == "ByteLevel" for step in steps_of(rust.pre_tokenizer, "pretokenizers"))


def _class_name(config: dict[str, Any]) -> str:
    """The class transformers would use, less "Fast": for some model types its own choice, whatever the folder says."""
    if config["model_type"] in _AS_IS_MODEL_TYPES:
        return "TokenizersBackend"
    return "Qwen2Tokenizer" if config["model_type"] == "qwen2" else (config.get("tokenizer_class") or "").removesuffix("Fast")


@dataclass(frozen=True)
class _Pipeline:
    """The stages that a class of transformers builds anew around the vocabulary and merges of tokenizer.json (LlamaTokenizer
    even puts spaces elsewhere than the file says)."""

    normalizer: Any
    pre_tokenizer: Any
    decoder: Any
    unk_token: str | None = None
    fuse_unk: bool = False
    byte_fallback: bool = False


def _rebuild(rust: tokenizers.Tokenizer, config: dict[str, Any]) -> bool:
    """Give a tokenizer the pipeline of its class. False when that class is not known here, or keeps other things of the file."""
    build, model = _PIPELINES.get(_class_name(config)), rust.model
    if build is None or not isinstance(model, models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    listed = {t if isinstance(t, str) else t["content"] for t in (config.get("added_tokens_decoder") or {}).values()}
    if listed and not {t.content for t in rust.get_added_tokens_decoder().values()} <= listed:
        return False  # the class would add what the config lists, and nothing of the file
    pipeline = build(config)
    rust.normalizer, rust.pre_tokenizer, rust.decoder = pipeline.normalizer, pipeline.pre_tokenizer, pipeline.decoder
    model.unk_token, model.fuse_unk, model.byte_fallback = pipeline.unk_token, pipeline.fuse_unk, pipeline.byte_fallback
    model.dropout, model.ignore_merges = None, False
    return True


def _qwen2_pipeline(config: dict[str, Any]) -> _Pipeline:
    split = pre_tokenizers.Split(tokenizers.Regex(QWEN2_WORDS), "isolated")
    words = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")), use_regex=False)
    return _Pipeline(normalizers.NFC(), pre_tokenizers.Sequence([split, words]), decoders.ByteLevel())


def _gpt2_pipeline(config: dict[str, Any]) -> _Pipeline:
    words = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    return _Pipeline(None, words, decoders.ByteLevel())


def _llama_pipeline(config: dict[str, Any]) -> _Pipeline:
    prefix = config.get("add_prefix_space")
    scheme = "never" if prefix is False else "always" if config.get("legacy", False) else "first"
    words = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    steps = [*_bytes_of_spelling(), *([] if prefix is False else [decoders.Strip(" ", 1, 0)])]
    return _Pipeline(None, words, decoders.Sequence(steps), fuse_unk=True, byte_fallback=True)


def _gemma_pipeline(config: dict[str, Any]) -> _Pipeline:
    unk = config.get("unk_token") or "<unk>"
    return _Pipeline(
        normalizers.Replace(" ", "▁"),
        pre_tokenizers.Split(" ", "merged_with_previous"),
        decoders.Sequence(_bytes_of_spelling()),
        unk_token=unk if isinstance(unk, str) else unk["content"],
        fuse_unk=True,
        byte_fallback=True,
    )


def _bytes_of_spelling() -> list[Any]:
    return [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


_PIPELINES: dict[str, Callable[[dict[str, Any]], _Pipeline]] = {
    "Qwen2Tokenizer": _qwen2_pipeline,
    "GPT2Tokenizer": _gpt2_pipeline,
    "LlamaTokenizer": _llama_pipeline,
    "GemmaTokenizer": _gemma_pipeline,
}
