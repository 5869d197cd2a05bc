"""What goes wrong between a hub and the disk, as errors that say how to go on.

Unreachable    the hub gave no answer: another hub, or the cache, may have the model
Interrupted    a transfer ended early: what has come is kept, another try goes on from there
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from llmkit.errors import DownloadError, ModelNotFoundError
from llmkit.hub.cache import free_space, size_text

NO_WRITE = (errno.EROFS, errno.EACCES, errno.EPERM)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Unreachable(ModelNotFoundError):
    """A hub that cannot be reached."""


class Interrupted(DownloadError):
    """A transfer that ended early. `fetched`: bytes that came and are kept; `retry_after`: seconds the server asked to wait."""

    def __init__(self, message: str, hint: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message, hint)
        self.retry_after, self.fetched = retry_after, 0


def gated(source: str, page: str, said: str, token: str) -> ModelNotFoundError:
    """401 or 403."""
    return ModelNotFoundError(
        f"{source} may not be read with this account: {said}",
        f"accept its licence (or ask for access) on {page}, then set {token} to a token of that account",
    )


def missing(source: str, revision: str | None) -> ModelNotFoundError:
    """404."""
    if revision:
        return ModelNotFoundError(
            f"{source} does not exist, or has no revision {revision!r}", "check both; without revision= the newest is taken"
        )
    return ModelNotFoundError(f"{source} does not exist, or is private", "check owner and name, letter by letter")


def wrong_content(source: str, path: str, said: str) -> DownloadError:
    """The bytes are not those that the listing promises."""
    return DownloadError(
        f"{source}: {path} is not what the hub's list promises: {said}; the file was removed, the others are kept",
        "try again later, or take the other hub (source='hf' or 'modelscope'); behind a proxy, ask whether it changes files",
    )


@contextlib.contextmanager
def disk(source: str, folder: Path, variable: str) -> Iterator[None]:
    """Failures of the disk under `folder`, told as such. `variable`: the environment variable that moves the cache."""
    try:
        yield
    except OSError as error:
        if isinstance(error, (DownloadError, ModelNotFoundError)) or error.errno not in FULL + NO_WRITE:
            raise
        raise disk_error(error, source, folder, variable) from error


def disk_error(error: OSError, source: str, folder: Path, variable: str) -> DownloadError:
    """DownloadError for a disk that is full or may not be written."""
    elsewhere = f"set {variable} (or cache_dir=, in the shell --cache-dir) to a folder on another disk"
    if error.errno in FULL:
        return DownloadError(
            f"{source}: the disk is full ({folder}: {size_text(free_space(folder))} free); what came is kept",
            f"free some space and call again, it goes on from there; or {elsewhere}",
        )
    return DownloadError(f"{source}: {error.filename or folder} cannot be written: {error.strerror}", elsewhere)
