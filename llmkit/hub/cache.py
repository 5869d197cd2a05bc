"""llmkit's own cache folder, and folders that are either whole or not there at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from llmkit.errors import DownloadError


def cache_root() -> Path:
    """`LLMKIT_HOME`, else `XDG_CACHE_HOME/llmkit`, else `~/.cache/llmkit`. Not created here."""
    if home := os.environ.get("LLMKIT_HOME"):
        return Path(home).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "llmkit"


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of `target` against other processes; the system frees it even after SIGKILL."""
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{target.name}.lock"):
        yield


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """An empty folder beside `target` that becomes `target` when the body ends well, and vanishes when it does not.

    To be used under `locked(target)`: then what a killed process left half-built belongs to nobody and is removed.
    """
    if target.exists() and any(target.iterdir()):
        raise DownloadError(f"{target} exists and is not empty: nothing is written over it", "name another folder, or remove it")
    prefix = f".{target.name}.partial-"
    for leftover in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        folder.chmod(0o755)  # mkdtemp makes it private; a shared cache must be readable by others
        yield folder
        if target.exists():
            target.rmdir()
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise DownloadError when `folder`'s disk has less than `needed` bytes free."""
    free = shutil.disk_usage(_existing(folder)).free
    if free < needed:
        raise DownloadError(
            f"{what} needs {size_text(needed)} in {folder}, only {size_text(free)} are free",
            "free some space, or set LLMKIT_HOME (or download_dir=) to a folder on a larger disk",
        )


def _existing(folder: Path) -> Path:
    return next(p for p in (folder, *folder.parents) if p.exists())


def size_text(size: float) -> str:
    """Bytes for people: `98.4 MB`, decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
