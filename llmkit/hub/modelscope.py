"""`modelscope:OWNER/NAME`: ModelScope, through modelscope_hub's own client and in its own cache.

The endpoint is always passed: without one the client probes a second site, and being offline takes 22 s instead of 7. The client
resumes, retries and compares each file's sha256 while it comes; it is given the list of files, so that it asks for nothing else
and reads nothing again that is known to be right.
"""

from __future__ import annotations

import contextlib
import glob
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmkit.errors import DownloadError, LlmkitError, ModelNotFoundError
from llmkit.hub import faults
from llmkit.hub.client import Job
from llmkit.hub.files import Listing, RemoteFile
from llmkit.hub.names import owner_spellings
from llmkit.hub.progress import Meter
from llmkit.hub.quiet import SilentBar, quiet

DEFAULT_REVISION = "master"


class ModelScope:
    """The hub at MODELSCOPE_ENDPOINT (or MODELSCOPE_DOMAIN); its cache is MODELSCOPE_CACHE, its token MODELSCOPE_API_TOKEN."""

    name = "modelscope"
    cache_variable = "MODELSCOPE_CACHE"
    offline = False
    tries = 1  # the client has five of its own

    def cache(self) -> Path:
        """The client's cache folder. Found without importing the client."""
        return Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser()

    def copies(self, model_id: str, revision: str | None, root: Path) -> list[Path]:
        """Folders under `root` where this model may lie: today's layout, then those of older clients."""
        repository = root / "models" / model_id.replace("/", "--") / "snapshots"
        wanted = [self.revision(revision)] if revision else [DEFAULT_REVISION, "main"]
        found = [repository / name for name in wanted if (repository / name).is_dir()]
        if not found and not revision and len(only := [p for p in repository.glob("*") if p.is_dir()]) == 1:
            found = only
        return found + ([] if revision else _old_copies(model_id, root))

    def revision(self, revision: str | None) -> str:
        """The default branch is `master` here; people used to Hugging Face say `main`."""
        return DEFAULT_REVISION if revision in (None, "main") else revision

    def folder(self, model_id: str, revision: str | None, commit: str | None, root: Path) -> Path:
        """Where a download belongs: beside an older client's files, if there are any, else in today's layout."""
        old = [p for p in _old_copies(model_id, root) if "models" in p.relative_to(root).parts] if not revision else []
        return old[0] if old else root / "models" / model_id.replace("/", "--") / "snapshots" / self.revision(revision)

    def repository(self, model_id: str, root: Path) -> Path:
        """What the lock of a download is named after."""
        return root / "models" / model_id.replace("/", "--")

    def endpoint(self) -> str:
        """MODELSCOPE_ENDPOINT, MODELSCOPE_DOMAIN, or the client's default."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # MODELSCOPE_DOMAIN is old, and still what many have set
            from modelscope_hub.config import HubConfig

            return str(HubConfig().endpoint)

    def listing(self, model_id: str, revision: str | None) -> Listing:
        """All files of the model. ModelNotFoundError, Interrupted."""
        with _translated(self, model_id, revision), _client() as api:
            entries = api(self.endpoint()).legacy.list_repo_files(model_id, "model", revision=self.revision(revision))
        return Listing([_file(e) for e in entries if (e.get("Type") or "blob") != "tree"])

    def download(self, job: Job) -> None:
        """Fetch the job's files. The client compares their sha256, where the listing has one."""
        entries = [{"Path": f.path, "Size": f.size, "Sha256": f.sha256, "Type": "blob"} for f in job.files]
        with _translated(self, job.id, job.revision), _client() as api:
            api(self.endpoint()).download_repo(
                job.id, "model", revision=self.revision(job.revision), cache_dir=job.root, local_dir=job.folder,
                file_list=entries, progress_callbacks=[_callback(job.meter)],
            )  # fmt: skip

    def half(self, file: RemoteFile, folder: Path) -> int:
        """Bytes of `file` that an interrupted download left."""
        path = folder / file.path
        parts = [path.with_name(f"{path.name}.incomplete"), *path.parent.glob(f"{glob.escape(path.name)}_*_*")]
        return sum(p.stat().st_size for p in parts if p.is_file())

    def compared(self, file: RemoteFile) -> bool:
        """True when `download` has compared this file's content."""
        return file.sha256 is not None

    def discard(self, path: Path) -> None:
        """Remove a file that is wrong."""
        path.unlink(missing_ok=True)

    def page(self, model_id: str) -> str:
        """Where a person reads about the model."""
        return f"{self.endpoint()}/models/{model_id}"


def _old_copies(model_id: str, root: Path) -> list[Path]:
    """Clients up to 1.37 wrote OWNER/NAME with dots as ___, those before 1.16 without models/; `hub/` was part of the default."""
    found = []
    for spelling in owner_spellings(model_id):
        owner, _, name = spelling.partition("/")
        inner = Path(owner, name.replace(".", "___"))
        found += [root / "models" / inner, root / "hub" / "models" / inner, root / inner, root / "hub" / inner]
    return [p for p in found if p.is_dir() and any(p.iterdir())]


def _file(entry: dict[str, Any]) -> RemoteFile:
    """Git's mode 120000 is a symbolic link, 160000 a submodule."""
    plain = (entry.get("Type") or "blob") == "blob" and str(entry.get("Mode") or "") not in ("120000", "160000")
    size = int(entry.get("Size") or 0)
    return RemoteFile(entry.get("Path") or entry.get("Name") or "", size, entry.get("Sha256") or None, plain=plain)


@contextlib.contextmanager
def _client() -> Iterator[Any]:
    """The client's HubApi class, while its own bars and warnings are silent."""
    from modelscope_hub import _download
    from modelscope_hub.api import HubApi

    with quiet("modelscope_hub", (_download, "tqdm", SilentBar)):
        yield lambda endpoint: HubApi(endpoint=endpoint)


def _callback(meter: Meter) -> type:
    """The client makes one object of this class for every try of every file, and begins by telling what lies on the disk."""
    from modelscope_hub._download import ProgressCallback

    class Forward(ProgressCallback):
        position = 0

        def update(self, size: int) -> None:
            self.position += size
            meter.at(self.filename, self.position)

    return Forward


@contextlib.contextmanager
def _translated(hub: ModelScope, model_id: str, revision: str | None) -> Iterator[None]:
    """The client's errors as llmkit's."""
    from modelscope_hub.errors import HubError

    try:
        yield
    except HubError as error:
        raise _translate(error, hub, model_id, revision) from error


def _translate(error: Exception, hub: ModelScope, model_id: str, revision: str | None) -> LlmkitError | OSError:
    from modelscope_hub import errors

    source = f"modelscope:{model_id}"
    if isinstance(error, errors.FileDownloadError) and error.failed_files:
        return _worst([_translate_file(p, e, hub, model_id, revision) for p, e in error.failed_files.items()])
    if isinstance(error, (errors.AuthenticationError, errors.PermissionDeniedError)):
        return faults.gated(source, hub.page(model_id), first_line(error), "MODELSCOPE_API_TOKEN")
    if isinstance(error, errors.NotExistError):
        return faults.missing(source, revision)
    if isinstance(error, (errors.NetworkError, errors.ServerError, errors.RateLimitError)):
        hint = "call again: it goes on from there; if it happens often, check the network and MODELSCOPE_ENDPOINT"
        return faults.Interrupted(f"{source}: {first_line(root_cause(error))}", hint, getattr(error, "retry_after", None))
    return DownloadError(f"{source}: {first_line(error)}", "call again: complete files are kept")


def _translate_file(
    path: str, error: BaseException, hub: ModelScope, model_id: str, revision: str | None
) -> LlmkitError | OSError:
    from modelscope_hub import errors

    source, cause = f"modelscope:{model_id}", root_cause(error)
    if isinstance(cause, OSError) and cause.errno in faults.FULL + faults.NO_WRITE:
        return cause
    if isinstance(error, errors.FileIntegrityError):
        return faults.wrong_content(source, path, first_line(error))
    if isinstance(error, errors.NotExistError):
        return faults.wrong_content(source, path, "the hub lists it, but does not have it")
    if isinstance(error, errors.HubError):
        return _translate(error, hub, model_id, revision)
    return faults.Interrupted(f"{source}: {path}: {first_line(cause)}", "call again: it goes on from there")


def _worst(errors: list[LlmkitError | OSError]) -> LlmkitError | OSError:
    """What no further try can mend comes first."""
    return min(errors, key=lambda e: (isinstance(e, faults.Interrupted), isinstance(e, ModelNotFoundError)))


def root_cause(error: BaseException) -> BaseException:
    """The error that began it: the client wraps a full disk as a failed connection."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
