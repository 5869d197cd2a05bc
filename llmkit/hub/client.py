"""What the two hubs' clients are made to offer alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from llmkit.hub.files import Listing, RemoteFile
from llmkit.hub.progress import Meter


@dataclass(frozen=True)
class Job:
    """`files` are to come into the snapshot `folder`, which lies in the cache `root`; `meter` is told every byte."""

    id: str
    revision: str | None
    files: list[RemoteFile]
    folder: Path
    root: Path
    meter: Meter


class Hub(Protocol):
    """A hub: where its cache is, what it has, and how its client fetches. `root` is the cache folder."""

    name: str
    cache_variable: str
    tries: int  # in a row without a byte until a transfer counts as failed

    @property
    def offline(self) -> bool:
        """Switched off by an environment variable."""
        ...

    def cache(self) -> Path:
        """The client's own cache folder. Found without importing the client."""
        ...

    def copies(self, model_id: str, revision: str | None, root: Path) -> list[Path]:
        """Folders where this model may lie, the best first."""
        ...

    def revision(self, revision: str | None) -> str:
        """The revision as this hub spells it."""
        ...

    def folder(self, model_id: str, revision: str | None, commit: str | None, root: Path) -> Path:
        """The snapshot folder into which a download goes."""
        ...

    def repository(self, model_id: str, root: Path) -> Path:
        """The folder of all snapshots of a model; its lock is named after it."""
        ...

    def endpoint(self) -> str:
        """The hub's address."""
        ...

    def listing(self, model_id: str, revision: str | None) -> Listing:
        """All files of the model. ModelNotFoundError, Interrupted."""
        ...

    def download(self, job: Job) -> None:
        """Fetch the job's files. ModelNotFoundError, Interrupted, DownloadError, OSError."""
        ...

    def half(self, file: RemoteFile, folder: Path) -> int:
        """Bytes of `file` that an interrupted download left."""
        ...

    def compared(self, file: RemoteFile) -> bool:
        """True when `download` compares this file's content."""
        ...

    def discard(self, path: Path) -> None:
        """Remove a file that is wrong."""
        ...
