"""What the flags of all measurements share: numbers of things, and files that are written at the end."""

from __future__ import annotations

import argparse
from pathlib import Path

from llmkit.errors import ConfigError


def natural(text: str) -> int:
    """argparse type: 0, 1, 2, ..."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative; got {value}")
    return value


def positive(text: str) -> int:
    """argparse type: 1, 2, ..."""
    value = natural(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def check_folders(args: argparse.Namespace, *flags: str) -> None:
    """ConfigError where the file of one of these flags has no folder to be written into: better now than after minutes of
    measuring."""
    for flag in flags:
        file = getattr(args, flag)
        if file and not Path(file).absolute().parent.is_dir():
            raise ConfigError(f"--{flag} {file}: the folder does not exist", f"mkdir -p {Path(file).parent}")


def own_name(model: str) -> str:
    """A model as it was asked for; of a file or folder only its own name, for where it lies is nobody's business."""
    return Path(model).name if Path(model).is_absolute() or Path(model).exists() else model
