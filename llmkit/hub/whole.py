"""Is a folder that another tool has downloaded a whole model? Told from its files alone: nothing is hashed, nobody is asked."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

from llmkit.hub.files import RemoteFile

HALF = re.compile(r".*(\.incomplete|\.parallel_tmp|_\d+_\d+)")  # what ModelScope's client leaves of interrupted files
TOKENIZER = ("tokenizer.json", "vocab", "merges.txt", ".model", ".tiktoken")


def on_disk(folder: Path) -> list[RemoteFile]:
    """The files of `folder` (and its sub-folders) as a listing without hashes; hidden ones and unfinished ones are left out."""
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    names = {p: p.relative_to(folder).as_posix() for p in paths}
    return [RemoteFile(names[p], p.stat().st_size) for p in paths if "/." not in f"/{names[p]}" and not HALF.fullmatch(p.name)]


def problem(folder: Path, wanted: list[RemoteFile]) -> str | None:
    """Why the files `wanted` of `folder` are no whole model; None when they are."""
    names = {f.path for f in wanted}
    if half := next((p.name for p in folder.iterdir() if HALF.fullmatch(p.name)), None):
        return f"{half} is unfinished"
    if any(n.endswith(".gguf") for n in names):
        return None  # the reader of GGUF files knows whether one is cut
    if "config.json" not in names:
        return "config.json is missing"
    if not any(part in n for n in names for part in TOKENIZER):
        return "the tokenizer is missing"
    return next((p for n in sorted(names) for p in [_weights_problem(folder / n)] if p), None)


def _weights_problem(path: Path) -> str | None:
    if path.name.endswith(".safetensors.index.json"):
        return _index_problem(path)
    return _safetensors_problem(path) if path.suffix == ".safetensors" else None


def _index_problem(path: Path) -> str | None:
    try:
        shards = set(json.loads(path.read_text("utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError):
        return f"{path.name} cannot be read"
    return next((f"{shard} is missing" for shard in sorted(shards) if not (path.parent / shard).is_file()), None)


def _safetensors_problem(path: Path) -> str | None:
    """A safetensors file begins with the length of its header, and the header says where the last tensor ends."""
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)) if length <= size - 8 else {}
        end = max((t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        return f"{path.name} is no safetensors file"
    return None if size == 8 + length + end else f"{path.name} is cut: {size:,} of {8 + length + end:,} bytes"
