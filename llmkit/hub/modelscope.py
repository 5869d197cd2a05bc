"""`modelscope:OWNER/NAME`: ModelScope, through modelscope_hub's own client and in its own cache.

The endpoint is always passed (without one the client probes a second site, and being offline takes 22 s instead of 7). The
file list is read and checked before anything is written, so a missing model leaves no folder and no name leads outside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from llmkit.errors import DownloadError, ModelNotFoundError
from llmkit.hub.cache import require_space
from llmkit.hub.progress import Bar, progress

PARTIAL_SUFFIXES = (".incomplete", ".parallel_tmp")


def fetch(model_id: str, *, revision: str | None, cache_dir: Path | None, patterns: list[str], local_files_only: bool) -> Path:
    """The snapshot folder of `model_id`. ModelNotFoundError when ModelScope lacks it, refuses it or cannot be reached and
    the cache has none; DownloadError when files are missing after the client's retries."""
    if local_files_only:
        return _cached(model_id, revision, cache_dir, patterns)
    try:
        with _translated(model_id):
            size = _check_listing(model_id, revision, patterns, cache_dir)
    except ModelNotFoundError as error:
        return _cached_instead(error, model_id, revision, cache_dir, patterns)
    with progress(size, f"modelscope:{model_id}") as bar, _translated(model_id):
        return _snapshot(model_id, revision, cache_dir, patterns, progress_callbacks=[_callback(bar)])


def endpoint() -> str:
    """MODELSCOPE_ENDPOINT, MODELSCOPE_DOMAIN, or the client's default."""
    from modelscope_hub.config import HubConfig

    return str(HubConfig().endpoint)


def _snapshot(model_id: str, revision: str | None, cache_dir: Path | None, patterns: list[str], **options: Any) -> Path:
    from modelscope_hub.compat.snapshot_download import snapshot_download

    return Path(
        snapshot_download(
            model_id,
            revision=revision,
            cache_dir=str(cache_dir) if cache_dir else None,
            allow_patterns=patterns,
            endpoint=endpoint(),
            **options,
        )
    )


def _cached(model_id: str, revision: str | None, cache_dir: Path | None, patterns: list[str]) -> Path:
    """The cached snapshot, if no file of it is still being (or was left) half downloaded."""
    with _translated(model_id):
        folder = _snapshot(model_id, revision, cache_dir, patterns, local_files_only=True)
    half = next((p for p in folder.rglob("*") if p.name.endswith(PARTIAL_SUFFIXES)), None)
    if half is not None:
        raise ModelNotFoundError(f"the cached copy {folder} is incomplete ({half.name})", "download it again while online")
    return folder


def _cached_instead(
    error: ModelNotFoundError, model_id: str, revision: str | None, cache_dir: Path | None, patterns: list[str]
) -> Path:
    """Unreachable is no reason to fail while a whole copy is here; not existing is."""
    if not isinstance(error.__cause__, ConnectionError):
        raise error
    try:
        return _cached(model_id, revision, cache_dir, patterns)
    except ModelNotFoundError:
        raise error from error.__cause__


def _check_listing(model_id: str, revision: str | None, patterns: list[str], cache_dir: Path | None) -> int:
    """Bytes the snapshot will hold. DownloadError for a file name that leads out of the folder, or a disk too full."""
    from modelscope_hub.api import HubApi
    from modelscope_hub.config import HubConfig

    listing = HubApi(endpoint=endpoint()).list_repo_files(model_id, "model", revision=revision)
    wanted = [f for f in listing if any(fnmatch(f.path, p) for p in patterns)]
    for file in wanted:
        parts = PurePosixPath(file.path).parts
        if ".." in parts or file.path.startswith("/") or "\\" in file.path or ":" in file.path:
            raise DownloadError(
                f"modelscope:{model_id} lists the file {file.path!r}, which lies outside the model's folder",
                "do not use this model: its file list is forged",
            )
    if not wanted:
        raise ModelNotFoundError(f"modelscope:{model_id} has none of the files asked for ({', '.join(patterns)})")
    size = sum(f.size or 0 for f in wanted)
    root = cache_dir or Path(HubConfig().cache_dir)
    have = sum(p.stat().st_size for p in root.glob(f"models/{model_id.replace('/', '--')}/snapshots/*/*") if p.is_file())
    require_space(root, size - have, f"modelscope:{model_id}")
    return size


@contextlib.contextmanager
def _translated(model_id: str) -> Iterator[None]:
    """The client's errors as llmkit's."""
    import requests
    from modelscope_hub.errors import (
        AuthenticationError,
        CacheError,
        HubError,
        NetworkError,
        NotExistError,
        PermissionDeniedError,
    )

    try:
        yield
    except (AuthenticationError, PermissionDeniedError) as error:
        raise ModelNotFoundError(f"ModelScope does not let you read {model_id}: {error}", "set MODELSCOPE_API_TOKEN") from error
    except (NotExistError, requests.HTTPError) as error:
        raise ModelNotFoundError(f"ModelScope has no model {model_id}: {_first_line(error)}") from error
    except CacheError as error:
        raise ModelNotFoundError(f"{model_id} is not in ModelScope's cache", "call once without local_files_only=True") from error
    except (NetworkError, requests.ConnectionError) as error:
        cause = error if isinstance(error, ConnectionError) else ConnectionError(str(error))
        raise ModelNotFoundError(
            f"ModelScope cannot be reached: {_first_line(error)}", "check the network and MODELSCOPE_ENDPOINT"
        ) from cause
    except HubError as error:
        raise DownloadError(
            f"downloading modelscope:{model_id} failed: {error}", "call again: complete files are kept"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _callback(bar: Bar) -> type:
    from modelscope_hub._download import ProgressCallback

    class Forward(ProgressCallback):
        def update(self, size: int) -> None:
            bar.update(size)

    return Forward
