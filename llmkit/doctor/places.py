"""Where models lie: free space, permission to write, and what is there."""

from __future__ import annotations

import os
from pathlib import Path

from llmkit.config import DEFAULT_MODEL
from llmkit.doctor.report import Finding, fail, ok, warn
from llmkit.doctor.software import short
from llmkit.hub import CLIENTS
from llmkit.hub.cache import cache_root, free_space, size_text

DEFAULT_BYTES = 400e6  # the default model's wheel, and what comes out of it
SMALL_MODEL_BYTES = 5e9
VARIABLES = {"llmkit": "LLMKIT_HOME", **{name: hub.cache_variable for name, hub in CLIENTS.items()}}


def folders() -> dict[str, Path]:
    """The caches: llmkit's own and those of the hubs' clients."""
    return {"llmkit": cache_root(), **{name: hub.cache() for name, hub in CLIENTS.items()}}


def disk() -> list[Finding]:
    """Free space of each disk that holds a cache."""
    spaces = {_existing(p).stat().st_dev: (p, free_space(p)) for p in reversed(folders().values())}
    detail = "; ".join(f"{size_text(free)} free for {short(p)}" for p, free in spaces.values())
    least = min(free for _, free in spaces.values())
    if least < DEFAULT_BYTES and not _default_is_here():
        return [fail("disk", f"{detail}: too little for any model", "export LLMKIT_HOME=/path/on/a/larger/disk")]
    if least < SMALL_MODEL_BYTES:
        return [warn("disk", f"{detail}: little for a model", "llmkit rm MODEL   # `llmkit list` names them; or move the caches: "
                     + ", ".join(VARIABLES.values()))]  # fmt: skip
    return [ok("disk", detail)]


def caches() -> list[Finding]:
    """May this user write there? What is cached already can be used without."""
    closed = {name: p for name, p in folders().items() if not os.access(_existing(p), os.W_OK)}
    if not closed:
        return [ok("caches", "writable")]
    detail = f"may not be written: {', '.join(short(p) for p in closed.values())}"
    fix = "   ".join(f"export {VARIABLES[name]}=/a/folder/of/yours" for name in closed)
    judge = fail if "llmkit" in closed and not _default_is_here() else warn
    return [judge("caches", f"{detail}; models that are there can still be used", fix)]


def models() -> list[Finding]:
    """What the caches hold."""
    from llmkit.hub.inventory import models as found_models

    found = found_models()
    if not found:
        return [ok("models", "none yet", f"llmkit pull {DEFAULT_MODEL}")]
    detail = f"{len(found)} here, {size_text(sum(m.size for m in found))}: {', '.join(sorted({m.id for m in found})[:6])}"
    if halves := [m for m in found if m.state.startswith("incomplete")]:
        fix = "   ".join(f"llmkit pull {m.source}:{m.id}" for m in halves)
        return [warn("models", f"{detail}; not whole: {', '.join(m.id for m in halves)}", fix)]
    return [ok("models", detail + (" …" if len({m.id for m in found}) > 6 else ""))]


def _default_is_here() -> bool:
    return any((cache_root() / "pypi" / DEFAULT_MODEL.partition(":")[2]).glob("[!.]*"))


def _existing(path: Path) -> Path:
    """The innermost folder of `path` that exists: there the rest would be made."""
    return next(p for p in (path, *path.parents) if p.exists())
