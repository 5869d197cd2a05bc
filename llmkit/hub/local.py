"""Models that are already here: a folder, or a .gguf file (converted once into a cached folder)."""

from __future__ import annotations

import difflib
from pathlib import Path

from llmkit.errors import ModelNotFoundError, WeightsError
from llmkit.hub.cache import cache_root


def looks_like_path(model: str) -> bool:
    """True for what can only be meant as a path: absolute, ./ ../ ~, a backslash, .gguf, or more parts than owner/name."""
    return model.startswith(("/", ".", "~")) or "\\" in model or model.lower().endswith(".gguf") or model.count("/") > 1


def find(model: str) -> Path:
    """The model folder at the path `model`. ModelNotFoundError says what is there instead."""
    path = Path(model).expanduser()
    if path.is_dir():
        return as_model_folder(path)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return converted(path)
        raise ModelNotFoundError(f"{path} is a file, but not a .gguf file", f"give its folder: {str(path.parent)!r}")
    near = near_names(path.name, [p.name for p in _siblings(path)])
    raise ModelNotFoundError(
        f"there is no folder or file {model!r}",
        f"near it: {', '.join(near)}" if near else "a hub id is owner/name, without a leading '/' or '.'",
    )


def as_model_folder(folder: Path) -> Path:
    """`folder` if it has config.json; the conversion of its one .gguf file if it has that instead."""
    if (folder / "config.json").is_file():
        return folder
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return converted(ggufs[0])
    if ggufs:
        raise ModelNotFoundError(
            f"{folder} has no config.json, and {len(ggufs)} GGUF files",
            f"name one of them: {', '.join(str(g) for g in ggufs[:4])}",
        )
    inner = ", ".join(str(p.parent) for p in sorted(folder.glob("*/config.json"))[:3])
    raise ModelNotFoundError(
        f"{folder} is not a model folder: it has no config.json",
        f"model folders in it: {inner}" if inner else "a model folder holds config.json, the tokenizer and *.safetensors",
    )


def converted(gguf: Path, root: Path | None = None) -> Path:
    """The Hugging Face folder of `gguf`, in `root` (llmkit's cache) / gguf; converted when this is the first time."""
    from llmkit.models.gguf import cached_folder, convert_gguf

    try:
        return convert_gguf(gguf, cached_folder(gguf, root or cache_root()))
    except PermissionError as error:
        raise WeightsError(
            f"{gguf}: no permission to read it or to write its conversion: {error}",
            "set LLMKIT_HOME to a folder you may write to",
        ) from error


def near_names(name: str, known: list[str]) -> list[str]:
    """Up to three of `known` that resemble `name`, whatever their case."""
    by_lower = {k.lower(): k for k in known}
    return [by_lower[k] for k in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)]


def _siblings(path: Path) -> list[Path]:
    try:
        return [p for p in path.parent.iterdir() if p.is_dir() or p.suffix == ".gguf"]
    except OSError:
        return []  # the parent is not there (or not readable): there is nothing to propose
