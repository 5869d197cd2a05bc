"""OUT.jsonl as a journal: a line counts when it is on the disk, whole; what a crash left of one is taken away."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llmkit.batch.tasks import ID_PREFIX, succeeded
from llmkit.errors import ConfigError

_START = b'{"id": "' + ID_PREFIX.encode()  # every line that `append` writes begins so


class Journal:
    """The answers so far. done: their ids. failed: how many of them are errors. Only one process at a time may hold it."""

    def __init__(self, path: Path, retry_failed: bool = False) -> None:
        """Open or begin `path`, for what a crash may have left of it. retry_failed: forget the errors in it.

        Raises ConfigError when it holds something else, or another process writes to it.
        """
        self.path = path
        self._file = _open(path)
        try:
            _lock(self._file, path)
            self._mend()
            if retry_failed:
                self._keep_successes()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _mend(self) -> None:
        """Cut off a last line without an end. A file that is none of ours is left as it is."""
        self._file.seek(0)
        end = torn = 0
        for line in self._file:
            end, torn = (end + len(line), 0) if line.endswith(b"\n") else (end, len(line))
        if not torn:
            return
        self._file.seek(end)
        if not self._file.read(len(_START)).startswith(_START[:torn]):
            raise _not_ours(self.path, "its end")
        self._file.truncate(end)
        os.fsync(self._file.fileno())

    def _lines(self) -> Iterator[dict[str, Any]]:
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            try:
                fields = json.loads(line)
            except ValueError:
                fields = None
            if not isinstance(fields, dict) or not str(fields.get("id", "")).startswith(ID_PREFIX):
                raise _not_ours(self.path, f"line {number}")
            yield fields

    def _read(self) -> None:
        self.done, self.failed = set[str](), 0
        for line in self._lines():
            self.done.add(line["id"])
            self.failed += not succeeded(line)

    def _keep_successes(self) -> None:
        """Rewrite the file without errors, beside itself, so that a crash leaves the old one or the new one."""
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        with beside.open("wb") as file:
            file.writelines(_line(fields) for fields in self._lines() if succeeded(fields))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.path)
        self._file.close()
        self._file = _open(self.path)
        _lock(self._file, self.path)

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Write these; they are on the disk when this returns."""
        lines = list(lines)
        self._file.seek(0, os.SEEK_END)
        self._file.write(b"".join(map(_line, lines)))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done.update(line["id"] for line in lines)
        self.failed += sum(not succeeded(line) for line in lines)

    def close(self) -> None:
        self._file.close()


def _line(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _open(path: Path) -> Any:
    try:
        file = path.open("a+b")
        if hasattr(os, "O_DIRECTORY"):  # a new name is on the disk only when its folder is
            folder = os.open(path.absolute().parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        return file
    except OSError as e:
        raise ConfigError(f"cannot write {path}: {e.strerror}", "give a file in an existing folder") from e


def _lock(file: Any, path: Path) -> None:
    """Keep a second `llmkit batch` off the file; the lock goes with this process, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows, where a second writer is the user's own affair
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        raise ConfigError(f"another process is writing to {path}", "wait for it, or end it") from e


def _not_ours(path: Path, where: str) -> ConfigError:
    return ConfigError(f"{path} is not a file of batch answers: {where} is something else", "give another file for the answers")
