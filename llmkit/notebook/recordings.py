"""Timelines that come with llmkit, recorded on machines that not every reader has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.errors import ConfigError

if TYPE_CHECKING:
    from llmkit.timeline import Timeline

_FOLDER = Path(__file__).parent / "data"


def recording(name: str) -> dict[str, Timeline]:
    """The timelines of a recording, by name. ConfigError for one that is not there."""
    from llmkit.timeline import load_timelines

    path = _FOLDER / f"{name}.json.gz"
    if not path.is_file():
        there = sorted(p.name.removesuffix(".json.gz") for p in _FOLDER.glob("*.json.gz"))
        raise ConfigError(f"there is no recording {name!r}", f"there are: {', '.join(there) or 'none'}")
    return load_timelines(path)
