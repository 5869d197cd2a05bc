"""llmkit's own cache folder, and folders that are either whole or not there at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
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
def locked(target: Path, waiting: str | None = None) -> Iterator[None]:
    """Hold the lock of `target` against other processes; the system frees it even after SIGKILL.

    waiting: what is said on stderr if another process holds it for more than a second.
    """
    from filelock import FileLock, Timeout

    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.parent / f".{target.name}.lock")
    try:
        lock.acquire(timeout=1 if waiting else -1)
    except Timeout:
        print(waiting, file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


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


def require_space(folder: Path, needed: int, what: str, variable: str = "LLMKIT_HOME") -> None:
    """Raise DownloadError when `folder`'s disk has less than `needed` bytes free. `variable` is what moves the folder."""
    free = free_space(folder)
    if free < needed:
        raise DownloadError(
            f"{what} needs {size_text(needed)} in {folder}, only {size_text(free)} are free",
            f"free some space, or set {variable} (or cache_dir=, download_dir= of LLM) to a folder on a larger disk",
        )


def free_space(folder: Path) -> int:
    """Bytes free on the disk of `folder`, which need not exist yet."""
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free


def size_text(size: float) -> str:
    """Bytes for people: `98.4 MB`, decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
