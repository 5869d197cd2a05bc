"""What a server tells of itself to whoever started it: one JSON file, whole at any moment."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from llmkit.errors import ConfigError, LlmkitError


class RunFile:
    """Keys: state ("starting", "ready", "failed", "stopping"), pid, create_time, url, host, port, argv, model,
    served_model_names, log, stages (name -> seconds), stage, error ({"type", "message", "hint"} or null).

    Without a path nothing is written.
    """

    def __init__(self, path: str | None, **facts: Any) -> None:
        self._path = Path(path) if path else None
        self.facts: dict[str, Any] = {"state": "starting", "stages": {}, "stage": None, "error": None, "log": _log_file()} | facts
        if self._path:
            import psutil

            self.facts |= {"pid": os.getpid(), "create_time": psutil.Process().create_time(), "argv": sys.argv}
        self._write()

    def update(self, **facts: Any) -> None:
        """Change some facts."""
        self.facts |= facts
        self._write()

    def fail(self, error: LlmkitError) -> None:
        """The server ends because of this."""
        self.update(state="failed", error={"type": type(error).__name__, "message": error.message, "hint": error.hint})

    def _write(self) -> None:
        if self._path is None:
            return
        new = self._path.with_name(f"{self._path.name}.{os.getpid()}.new")
        try:
            new.write_text(json.dumps(self.facts), "utf-8")
            new.replace(self._path)
        except OSError as e:
            what = f"--run-file: {self._path} cannot be written: {e.strerror}"
            raise ConfigError(what, "name a file in a folder that exists") from e


def _log_file() -> str | None:
    """The file that stderr goes to, if it is one and the system tells its name."""
    link = Path("/proc/self/fd/2")
    target = os.readlink(link) if link.exists() else ""
    return target if target.startswith("/") and Path(target).is_file() else None
