"""`hf:OWNER/NAME`: the Hugging Face hub, through huggingface_hub's own client and in its own cache.

The client's snapshot_download neither resumes in another process nor compares hashes. So large files come through its http_get,
which resumes, into the place where snapshot_download then finds them; it fetches the small ones and makes the snapshot's links.
"""

from __future__ import annotations

import contextlib
import glob
import io
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from llmkit.errors import DownloadError, LlmkitError, ModelNotFoundError
from llmkit.hub import faults
from llmkit.hub.client import Job
from llmkit.hub.files import Listing, RemoteFile
from llmkit.hub.manifest import difference
from llmkit.hub.modelscope import first_line
from llmkit.hub.names import YES
from llmkit.hub.network import persist
from llmkit.hub.progress import Meter
from llmkit.hub.quiet import SilentBar, quiet

DEFAULT_REVISION = "main"
WORKERS = 4
CHUNK = 1 << 14  # bytes between two writes: the client's 10 MB would be lost at each cut, and the bar would stand still
HINT = "call again: it goes on from there; if it happens often, check the network and HF_ENDPOINT"


class HuggingFace:
    """The hub at HF_ENDPOINT; its cache is HF_HUB_CACHE or HF_HOME/hub, its token HF_TOKEN.

    The client reads these once, when it is imported: too early in a notebook. Here they are read at every call.
    """

    name = "hf"
    cache_variable = "HF_HUB_CACHE"
    tries = 5

    @property
    def offline(self) -> bool:
        """HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE."""
        return any(os.environ.get(v, "").lower() in YES for v in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))

    def cache(self) -> Path:
        """The client's cache folder. Found without importing the client."""
        if named := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
            return Path(named).expanduser()
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(os.environ.get("HF_HOME") or f"{base}/huggingface").expanduser() / "hub"

    def copies(self, model_id: str, revision: str | None, root: Path) -> list[Path]:
        """The snapshot folder under `root` that this revision names, if it is there."""
        repository, name = self.repository(model_id, root), self.revision(revision)
        snapshots = repository / "snapshots"
        found = [snapshots / name]
        with contextlib.suppress(OSError):  # no such reference: then the revision is a commit, or it is not here
            found.append(snapshots / (repository / "refs" / name).read_text("utf-8").strip())
        if not revision and len(found) == 1 and len(only := list(snapshots.glob("*"))) == 1:
            found = only
        return [p for p in found if p.is_dir()]

    def revision(self, revision: str | None) -> str:
        """The default branch is `main` here; people used to ModelScope say `master`."""
        return DEFAULT_REVISION if revision in (None, "master") else revision

    def folder(self, model_id: str, revision: str | None, commit: str | None, root: Path) -> Path:
        """The snapshot folder of a commit."""
        return self.repository(model_id, root) / "snapshots" / (commit or self.revision(revision))

    def repository(self, model_id: str, root: Path) -> Path:
        """The folder of all snapshots and blobs of a model."""
        return root / f"models--{model_id.replace('/', '--')}"

    def endpoint(self) -> str:
        """HF_ENDPOINT, or the client's default."""
        from huggingface_hub import constants

        return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")

    def listing(self, model_id: str, revision: str | None) -> Listing:
        """All files of the model at one commit. ModelNotFoundError, Interrupted."""
        from huggingface_hub import HfApi

        def ask() -> tuple[str | None, list[Any]]:
            with _translated(self, model_id, revision), quiet("huggingface_hub"):
                api = HfApi(endpoint=self.endpoint())
                commit = api.model_info(model_id, revision=self.revision(revision)).sha
                return commit, list(api.list_repo_tree(model_id, revision=commit, recursive=True))

        commit, tree = persist(ask, lambda: 0, tries=3)
        return Listing([_file(e) for e in tree if type(e).__name__ != "RepoFolder"], commit)

    def download(self, job: Job) -> None:
        """Fetch the job's files. Large ones are compared with their sha256."""
        from huggingface_hub import constants

        smaller = (constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
        with _translated(self, job.id, job.revision), quiet("huggingface_hub.file_download", smaller), quiet("huggingface_hub"):
            self._fetch_blobs(job)
            made = self._fetch_the_rest(job)
        if made.name != job.folder.name:
            raise faults.Interrupted(f"hf:{job.id} got a new version during the download", "call again")
        for file in job.files:
            job.meter.at(file.path, file.size)

    def _fetch_blobs(self, job: Job) -> None:
        from huggingface_hub import hf_hub_url

        stop, endpoint = threading.Event(), self.endpoint()
        blobs = self.repository(job.id, job.root) / "blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        once = {f.sha256: f for f in job.files if f.sha256}.values()  # two names of one content are one blob
        urls = {f: hf_hub_url(job.id, f.path, revision=job.folder.name, endpoint=endpoint) for f in once}
        pool = ThreadPoolExecutor(WORKERS)
        try:
            futures = [pool.submit(_fetch_blob, f"hf:{job.id}", url, f, blobs, job.meter, stop) for f, url in urls.items()]
            for future in as_completed(futures):
                future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)

    def _fetch_the_rest(self, job: Job) -> Path:
        """Small files, and the snapshot's links to the large ones; the snapshot's folder."""
        from huggingface_hub import snapshot_download

        options: dict[str, Any] = {"cache_dir": job.root, "endpoint": self.endpoint(), "tqdm_class": SilentBar}
        names = [glob.escape(f.path) for f in job.files]
        revision = self.revision(job.revision)
        return Path(snapshot_download(job.id, revision=revision, allow_patterns=names, max_workers=WORKERS, **options))

    def half(self, file: RemoteFile, folder: Path) -> int:
        """Bytes of `file` that an interrupted download left."""
        half = folder.parent.parent / "blobs" / f"{file.sha256}.incomplete"
        return half.stat().st_size if half.is_file() else 0

    def compared(self, file: RemoteFile) -> bool:
        """True when `download` has compared this file's content."""
        return file.sha256 is not None

    def discard(self, path: Path) -> None:
        """Remove a file that is wrong: the snapshot's link and the blob it leads to."""
        blob = path.resolve()
        path.unlink(missing_ok=True)
        if blob.parent.name == "blobs":
            blob.unlink(missing_ok=True)

    def page(self, model_id: str) -> str:
        """Where a person reads about the model."""
        return f"{self.endpoint()}/{model_id}"


def _file(entry: Any) -> RemoteFile:
    if type(entry).__name__ != "RepoFile":
        return RemoteFile(entry.path, 0, plain=False)
    if entry.lfs:
        return RemoteFile(entry.path, entry.lfs.size, entry.lfs.sha256)
    return RemoteFile(entry.path, entry.size, git_sha1=entry.blob_id)


class _Half(io.FileIO):
    """An unfinished file that tells the meter where it stands, and ends the transfer when another file's has failed."""

    def __init__(self, path: Path, name: str, meter: Meter, stop: threading.Event) -> None:
        super().__init__(path, "ab")
        self._name, self._meter, self._stop = name, meter, stop
        self._meter.at(name, self.tell())

    def write(self, data: Any, /) -> int:
        if self._stop.is_set():
            raise faults.Interrupted(f"{self._name}: another file's transfer failed")
        view = memoryview(data)
        while len(view):  # a raw file may take only a part, so that a full disk shows at the next one
            view = view[super().write(view) :]
        self._meter.at(self._name, self.tell())
        return len(data)

    def truncate(self, size: int | None = None, /) -> int:
        """The client's answer to a server that ignores Range: begin anew."""
        size = super().truncate(size)
        self._meter.at(self._name, size)
        return size


def _fetch_blob(source: str, url: str, file: RemoteFile, blobs: Path, meter: Meter, stop: threading.Event) -> None:
    """Bring `file` to blobs/SHA256: resumed where it was left, compared, and only then under its name."""
    blob, half = blobs / str(file.sha256), blobs / f"{file.sha256}.incomplete"
    wrong = difference(blob, file)
    for _ in range(2):  # one chance more: what an earlier run left may be spoilt
        if wrong is None:
            return meter.at(file.path, file.size)
        wrong = _transfer(url, file, half, meter, stop) or difference(half, file)
        if wrong is None:
            half.replace(blob)
        else:
            half.unlink()
            meter.at(file.path, 0)
    if wrong:
        raise faults.wrong_content(source, file.path, wrong)


def _transfer(url: str, file: RemoteFile, half: Path, meter: Meter, stop: threading.Event) -> str | None:
    """Append to `half` what it lacks of `file`; what is wrong with the server's answer, if its length already tells."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    with _Half(half, file.path, meter, stop) as stream:
        if stream.tell() > file.size:
            return f"{stream.tell():,} bytes came, not {file.size:,}"
        try:
            http_get(url, stream, resume_size=stream.tell(), headers=headers, expected_size=file.size, tqdm_class=SilentBar)  # pyright: ignore[reportArgumentType]
        except OSError as error:  # the client's HTTP errors are such, too
            beyond = getattr(getattr(error, "response", None), "status_code", None) == 416  # the hub's file ends before ours
            if not beyond and not str(error).startswith("Consistency check failed"):
                raise
            return f"{stream.tell():,} bytes came, not {file.size:,}"
    return None


@contextlib.contextmanager
def _translated(hub: HuggingFace, model_id: str, revision: str | None) -> Iterator[None]:
    """The client's errors as llmkit's."""
    from huggingface_hub import errors

    try:
        yield
    except LlmkitError:
        raise
    except (
        errors.HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # httpx's, or httpx2's in newer versions
        errors.HFValidationError,
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
    ) as error:
        raise _translate(error, hub, model_id, revision) from error


def _translate(error: Exception, hub: HuggingFace, model_id: str, revision: str | None) -> LlmkitError:
    from huggingface_hub import errors

    source, said = f"hf:{model_id}", first_line(error)
    response = getattr(error, "response", None)
    status = response.status_code if response is not None else None
    if isinstance(error, errors.HFValidationError):
        return ModelNotFoundError(f"{model_id!r} is not a Hugging Face id: {said}", "an id is OWNER/NAME")
    if isinstance(error, errors.RevisionNotFoundError):
        return faults.missing(source, hub.revision(revision))
    absent = isinstance(error, errors.RepositoryNotFoundError)
    if isinstance(error, errors.GatedRepoError) or (status in (401, 403) and not absent):
        return faults.gated(source, hub.page(model_id), said, "HF_TOKEN")
    if absent:
        return faults.missing(source, None)
    if status == 404:
        return DownloadError(f"{source}: the hub lists a file that it does not have: {said}", "try again later")
    if status is not None and 400 <= status < 500 and status not in (408, 416, 429):
        return DownloadError(f"{source}: the hub refused: {said}", "check HF_ENDPOINT")
    return faults.Interrupted(f"{source}: {said}", HINT, _retry_after(response))


def _retry_after(response: Any) -> float | None:
    value = response.headers.get("Retry-After", "") if response is not None else ""
    return float(value) if value.isdigit() else None
