"""The hubs' clients draw bars and print warnings of their own; while llmkit's display is up they are silent."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # both clients import it, and in a notebook without ipywidgets it complains
    import tqdm.auto


class SilentBar(tqdm.tqdm):
    """A tqdm that never draws."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options.pop("name", None)  # huggingface_hub's own bars have one
        super().__init__(*args, **options | {"disable": True})


_lock = threading.Lock()
_depth: dict[str, int] = {}
_before: dict[str, tuple[int, Any]] = {}


@contextlib.contextmanager
def quiet(logger: str, replaced: tuple[Any, str, Any] | None = None) -> Iterator[None]:
    """Silence `logger`, and replace one attribute (object, name, value), until the last of several threads is done."""
    log = logging.getLogger(logger)
    with _lock:
        if _depth.get(logger, 0) == 0:
            _before[logger] = log.level, replaced and getattr(replaced[0], replaced[1])
            log.setLevel(logging.CRITICAL + 1)
            if replaced:
                setattr(*replaced)
        _depth[logger] = _depth.get(logger, 0) + 1
    try:
        yield
    finally:
        with _lock:
            _depth[logger] -= 1
            if _depth[logger] == 0:
                level, value = _before.pop(logger)
                log.setLevel(level)
                if replaced:
                    setattr(replaced[0], replaced[1], value)
