"""The files a hub lists for a model: are their names sound, and which of them are needed?"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import PurePosixPath

from llmkit.errors import DownloadError, ModelNotFoundError
from llmkit.hub.cache import size_text
from llmkit.hub.names import Request

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
    "README.md",  # names the licence
    "LICENSE*",
]
"""What a model needs to run: no pickled weights, no code, no files of other frameworks, nothing in sub-folders."""
STANDARD_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
QUANT = re.compile(r"[-._](IQ\d\w*|Q\d\w*|BF16|FP?16|FP?32|MXFP4\w*|TQ\d\w*)(?=[-.]|$)", re.I)
PART = re.compile(r"-\d{5}-of-\d{5}$")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class RemoteFile:
    """One file of a model as its hub lists it. `git_sha1` is git's own name of a small file on Hugging Face."""

    path: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None
    plain: bool = True  # False: a link or a submodule


@dataclass(frozen=True)
class Listing:
    """What a hub says a model consists of, at one commit (where the hub tells it)."""

    files: list[RemoteFile]
    commit: str | None = None


def check_names(source: str, files: Iterable[RemoteFile]) -> None:
    """DownloadError for a file whose name leads out of the model's folder, or that is a link."""
    for file in files:
        parts = PurePosixPath(file.path).parts
        outside = not parts or ".." in parts or file.path.startswith(("/", "~")) or re.search(r"[\\\x00-\x1f]|^\w:", file.path)
        if outside or not file.plain:
            what = "lies outside the model's folder" if outside else "is a link, not a file"
            raise DownloadError(
                f"{source} lists {file.path!r}, which {what}; nothing was written",
                "do not use this model: its file list is forged",
            )


def choose(source: str, files: list[RemoteFile], request: Request) -> list[RemoteFile]:
    """The files of the listing that `request` wants. ModelNotFoundError when there are none, or when several GGUF files
    could be meant: it lists them."""
    if request.patterns is not None:
        return _matching(source, files, request.patterns)
    root = [f for f in files if "/" not in f.path]
    ggufs = [f for f in files if f.path.endswith(".gguf") and "mmproj" not in f.path.lower()]
    weights = [f for f in root if f.path.endswith(".safetensors")]
    if request.quant or (ggufs and not weights):
        return [*_one_quantisation(source, ggufs, request), *(f for f in root if f.path.startswith(("README.md", "LICENSE")))]
    if not weights:
        raise _no_weights(source, root)
    standard = [f for f in weights if STANDARD_WEIGHTS.fullmatch(f.path)]
    spare = {f.path for f in weights if standard and f not in standard}  # the same weights again: consolidated, fp16, ...
    return [f for f in root if f.path not in spare and any(fnmatch(f.path, p) for p in NEEDED)]


def _matching(source: str, files: list[RemoteFile], patterns: tuple[str, ...]) -> list[RemoteFile]:
    found = [f for f in files if any(fnmatch(f.path, p) for p in patterns)]
    if not found:
        some = ", ".join(f.path for f in files[:6])
        raise ModelNotFoundError(f"{source} has no file that matches {', '.join(patterns)}", f"it has: {some}" if some else None)
    return found


def _no_weights(source: str, root: list[RemoteFile]) -> ModelNotFoundError:
    if any(f.path.endswith(PICKLED) for f in root):
        return ModelNotFoundError(
            f"{source} has pickled weights only (.bin, .pt), which may run code when they are loaded",
            "look for a copy with *.safetensors or a .gguf file; to fetch the files anyway give allow_patterns",
        )
    return ModelNotFoundError(
        f"{source} has no *.safetensors and no .gguf file, so it is no language model llmkit could load",
        "to fetch its files anyway give allow_patterns",
    )


def quantisation(path: str) -> str:
    """`Q4_K_M` of `name-Q4_K_M-00001-of-00002.gguf`; the file's stem where the name tells none."""
    stem = PART.sub("", PurePosixPath(path).stem)
    found = QUANT.findall(stem)
    return found[-1].upper() if found else stem


def _one_quantisation(source: str, ggufs: list[RemoteFile], request: Request) -> list[RemoteFile]:
    choices: dict[str, list[RemoteFile]] = {}
    for file in ggufs:
        choices.setdefault(quantisation(file.path), []).append(file)
    asked = next((c for c in choices if c.lower() == (request.quant or "").lower()), None)
    if asked is None and len(choices) == 1 and not request.quant:
        asked = next(iter(choices))
    if asked is None:
        raise _which(source, choices, request)
    if len(choices[asked]) > 1:
        raise ModelNotFoundError(
            f"{source}: {asked} is split into {len(choices[asked])} files, which llmkit does not join",
            "choose a quantisation that is one file, or join it with llama.cpp's gguf-split --merge and give the file",
        )
    return choices[asked]


def _which(source: str, choices: dict[str, list[RemoteFile]], request: Request) -> ModelNotFoundError:
    sizes = {c: sum(f.size for f in fs) for c, fs in choices.items()}
    shown = ", ".join(f"{c} ({size_text(sizes[c])})" for c in sorted(sizes, key=lambda c: sizes[c]))
    if not choices:
        return ModelNotFoundError(f"{source} has no GGUF file, so no quantisation {request.quant}", f"leave :{request.quant} out")
    what = f"has no GGUF file of type {request.quant}" if request.quant else f"holds {len(choices)} GGUF models; none is named"
    example = next((c for c in choices if c == "Q4_K_M"), min(sizes, key=lambda c: sizes[c]))
    return ModelNotFoundError(f"{source} {what}: it has {shown}", f"name one: {request.id}:{example}")
