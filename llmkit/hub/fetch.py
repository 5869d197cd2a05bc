"""A model of a hub -> its folder, whole and proven: looked up on the disk, or listed, checked, fetched and compared.

What both hubs' clients leave open is closed here, once: forged names, a full disk, damaged files, half models, work done twice.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from llmkit.errors import DownloadError, ModelNotFoundError
from llmkit.hub import faults, local, whole
from llmkit.hub.cache import locked, require_space
from llmkit.hub.client import Hub, Job
from llmkit.hub.files import Listing, RemoteFile, check_names, choose
from llmkit.hub.manifest import Manifest
from llmkit.hub.names import Request
from llmkit.hub.network import persist
from llmkit.hub.progress import Meter, progress
from llmkit.hub.report import DownloadReport


def on_disk(hub: Hub, request: Request) -> tuple[Path | None, str | None]:
    """(the model's folder in the hub's cache, or None; why a copy that is there cannot be used). Asks nobody; hashes only
    what was touched since it was proven."""
    why = None
    for folder in hub.copies(request.id, request.revision, _root(hub, request)):
        try:
            wanted, wrong = _judge(hub, folder, request)
        except ModelNotFoundError as error:
            why = error.message
            continue
        if wrong is None:
            return _model(folder, wanted, request), None
        why = f"the copy in {folder} is not whole: {wrong}"
    return None, why


def _judge(hub: Hub, folder: Path, request: Request) -> tuple[list[RemoteFile], str | None]:
    """(the wanted files of a folder in the cache, what is wrong with them)"""
    manifest, source = Manifest.read(folder), f"{hub.name}:{request.id}"
    if manifest is None:
        wanted = choose(source, whole.on_disk(folder), request)
        if request.patterns is None:
            return wanted, whole.problem(folder, wanted)
        return wanted, None if request.local_files_only else "nothing tells whether these are all files that match"
    wanted, before = choose(source, manifest.files, request), dict(manifest.verified)
    missing = manifest.unproven(folder, wanted)
    if manifest.verified != before:
        _save(manifest, folder)
    return wanted, f"{missing[0].path} is missing or damaged" if missing else None


def _save(manifest: Manifest, folder: Path) -> None:
    try:
        manifest.write(folder)
    except OSError:
        return  # a cache that only others may write: then each start reads the touched files again


def from_hub(hub: Hub, request: Request) -> tuple[Path, DownloadReport]:
    """Fetch what is missing of a model. Raises ModelNotFoundError (not there, not allowed, several could be meant),
    faults.Interrupted, DownloadError (disk, forged names, wrong content)."""
    source, root = f"{hub.name}:{request.id}", _root(hub, request)
    listing = hub.listing(request.id, request.revision)
    check_names(source, listing.files)
    wanted = choose(source, listing.files, request)
    folder = hub.folder(request.id, request.revision, listing.commit, root)
    _refuse_links(source, folder, wanted)
    waiting = f"{source}: another process is fetching this model; waiting for it"
    with faults.disk(source, root, hub.cache_variable), locked(hub.repository(request.id, root), waiting):
        report = _complete(hub, request, listing, wanted, folder)
    return _model(folder, wanted, request), report


def _root(hub: Hub, request: Request) -> Path:
    return request.cache_dir or hub.cache()


def _model(folder: Path, wanted: list[RemoteFile], request: Request) -> Path:
    """The folder an engine can load."""
    ggufs = [f for f in wanted if f.path.endswith(".gguf")]
    if request.patterns is not None:
        return folder
    return local.converted(folder / ggufs[0].path, request.cache_dir) if ggufs else local.as_model_folder(folder)


def _refuse_links(source: str, folder: Path, wanted: list[RemoteFile]) -> None:
    """A link to elsewhere where a sub-folder should be would let a sound name write outside."""
    for parent in {(folder / f.path).parent for f in wanted} - {folder}:
        if parent.exists() and not parent.resolve().is_relative_to(folder.resolve()):
            raise DownloadError(f"{source}: {parent} is a link that leads out of the model's folder", f"remove it: rm {parent}")


def _complete(hub: Hub, request: Request, listing: Listing, wanted: list[RemoteFile], folder: Path) -> DownloadReport:
    """Make all of `wanted` be in `folder` and proven; under the lock."""
    source, revision = f"{hub.name}:{request.id}", hub.revision(request.revision)
    manifest = Manifest.read(folder) or Manifest(hub.name, request.id, revision, listing.commit, [])
    manifest.update(listing, wanted)
    missing = manifest.unproven(folder, wanted)
    halves = {f.path: hub.half(f, folder) for f in missing}
    report = DownloadReport(request.shown, hub.name, folder, revision)
    if missing:
        room = sum(f.size for f in missing) - sum(halves.values())
        require_space(folder, room, source, hub.cache_variable)
        folder.mkdir(parents=True, exist_ok=True)
        manifest.write(folder)  # from now on the folder is known to be unfinished
        _discard_wrong(hub, source, missing, folder)
        with progress(sum(f.size for f in missing), source, len(missing)) as bar:
            _download(hub, request, manifest, missing, folder, Meter(bar, {f.path: f.size for f in missing}, halves))
        report = DownloadReport(
            request.shown, hub.name, folder, revision, bytes=bar.received, resumed_bytes=bar.resumed, files=len(missing)
        )
        manifest.write(folder)
    else:
        _save(manifest, folder)
    return report


def _discard_wrong(hub: Hub, source: str, files: list[RemoteFile], folder: Path) -> None:
    """Files that are there and not right must go first: the clients might take them for whole."""
    for path in (folder / f.path for f in files):
        if path.exists() or path.is_symlink():
            print(f"{source}: {path} is not (or no longer) what the hub lists; it is fetched again", file=sys.stderr)
            hub.discard(path)


def _download(hub: Hub, request: Request, manifest: Manifest, missing: list[RemoteFile], folder: Path, meter: Meter) -> None:
    """Fetch `missing`, again and again while bytes come, and compare what the client has not compared."""
    job = Job(request.id, request.revision, missing, folder, _root(hub, request), meter)

    def attempt() -> None:
        left = [f for f in missing if not manifest.is_verified(folder, f)]
        try:
            hub.download(replace(job, files=left))
        finally:
            _accept(hub, manifest, left, folder)

    try:
        persist(attempt, lambda: meter.bar.received, hub.tries, meter.bar.say)
        _compare(hub, request, manifest, missing, folder)
    except BaseException:  # an interrupt, too
        _save(manifest, folder)  # what was proven need not be read again next time
        raise


def _accept(hub: Hub, manifest: Manifest, files: list[RemoteFile], folder: Path) -> None:
    for file in files:
        if hub.compared(file):
            manifest.trust(folder, file)


def _compare(hub: Hub, request: Request, manifest: Manifest, files: list[RemoteFile], folder: Path) -> None:
    for file in files:
        if not manifest.is_verified(folder, file) and (wrong := manifest.prove(folder, file)):
            hub.discard(folder / file.path)
            raise faults.wrong_content(f"{hub.name}:{request.id}", file.path, wrong)
