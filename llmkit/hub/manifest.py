"""The note a download leaves in its folder: what the hub listed, and which files were seen to be exactly that.

A file counts as verified while its size and modification time are those of the moment its hash was right, so the second start
hashes nothing. A folder with a manifest is never taken for whole while a wanted file is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llmkit.hub.files import Listing, RemoteFile

NAME = ".llmkit.json"
VERSION = 1


@dataclass
class Manifest:
    """`asked`: the paths that were ever wanted; `verified`: path -> (size, mtime in ns) when its content was proven."""

    source: str
    id: str
    revision: str | None
    commit: str | None
    files: list[RemoteFile]
    asked: list[str] = field(default_factory=list)
    verified: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest in `folder`; None when there is none that this version understands."""
        try:
            value = json.loads((folder / NAME).read_text("utf-8"))
            if value.pop("version") != VERSION:
                return None
            files = [RemoteFile(**f) for f in value.pop("files")]
            verified = {path: (int(size), int(time)) for path, (size, time) in value.pop("verified").items()}
            return cls(files=files, verified=verified, **value)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # absent or damaged: then the folder is judged without
            return None

    def write(self, folder: Path) -> None:
        """Replace the manifest in `folder` at once. OSError when it cannot be written."""
        temporary = folder / f"{NAME}.{os.getpid()}"
        value = {"version": VERSION, **asdict(self)}
        try:
            temporary.write_text(json.dumps(value, ensure_ascii=False), "utf-8")
            temporary.replace(folder / NAME)
        finally:
            temporary.unlink(missing_ok=True)

    def update(self, listing: Listing, wanted: list[RemoteFile]) -> None:
        """Take over a new listing; what was proven stays so only while the hub still lists the same content."""
        same = set(self.files) & set(listing.files)
        self.verified = {f.path: self.verified[f.path] for f in same if f.path in self.verified}
        self.files, self.commit = listing.files, listing.commit
        self.asked = sorted({f.path for f in wanted} | {f.path for f in same if f.path in self.asked})

    def asked_files(self) -> list[RemoteFile]:
        """The files that were ever wanted of this model."""
        return [f for f in self.files if f.path in self.asked]

    def is_verified(self, folder: Path, file: RemoteFile) -> bool:
        """True when the file was proven and has not been touched since. Reads nothing."""
        return file.path in self.verified and self.verified[file.path] == _state(folder / file.path)

    def prove(self, folder: Path, file: RemoteFile) -> str | None:
        """Read the file and compare. None, and remembered, when it is what the hub lists; else what is wrong with it."""
        state = _state(folder / file.path)
        wrong = difference(folder / file.path, file)
        if wrong is None and state:
            self.verified[file.path] = state
        return wrong

    def unproven(self, folder: Path, wanted: list[RemoteFile]) -> list[RemoteFile]:
        """Those of `wanted` that are missing or wrong. Files touched since they were proven are read again."""
        return [f for f in wanted if not self.is_verified(folder, f) and self.prove(folder, f)]

    def trust(self, folder: Path, file: RemoteFile) -> None:
        """Remember that another hand has compared the file's content while it came."""
        if (state := _state(folder / file.path)) and state[0] == file.size:
            self.verified[file.path] = state


def difference(path: Path, file: RemoteFile) -> str | None:
    """What distinguishes the file at `path` from what the hub lists; None when nothing does."""
    state = _state(path)
    if state is None:
        return "it is missing"
    if state[0] != file.size:
        return f"it has {state[0]:,} bytes, not {file.size:,}"
    if file.sha256 and (found := digest(path)) != file.sha256.lower():
        return f"its sha256 is {found[:12]}…, not {file.sha256[:12].lower()}…"
    if file.git_sha1 and not file.sha256 and git_digest(path) != file.git_sha1:
        return f"its content is not {file.git_sha1[:12]}…"
    return None


def digest(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def git_digest(path: Path) -> str:
    """The name git gives to a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _state(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns
