"""Numbers that Prometheus can read: where they are kept, and how they are written.

All numbers of one front lie in one row of float64. Several fronts lay theirs into files of one folder, and each of them answers a
scrape with the sums, for a scrape meets any of them.
"""

from __future__ import annotations

import math
import mmap
import os
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Store:
    """Rows of numbers, handed out as slices. With a folder they lie in a file of this process, and sums go over all files."""

    def __init__(self, size: int, folder: Path | None = None) -> None:
        self._size, self._used, self._folder = size, 0, folder
        if folder is None:
            self._own: memoryview[float] = memoryview(bytearray(8 * size)).cast("d")
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{os.getpid()}-{time.monotonic_ns()}.f64"
        with self._path.open("w+b") as file:
            file.truncate(8 * size)
            self._own = memoryview(mmap.mmap(file.fileno(), 8 * size)).cast("d")

    def take(self, count: int) -> tuple[memoryview[float], slice]:
        """A view of `count` numbers that are still zero, and where they lie."""
        where = slice(self._used, self._used + count)
        if where.stop > self._size:
            raise IndexError(f"the store has {self._size} places, and {where.stop} are wanted")
        self._used = where.stop
        return self._own[where], where

    def sums(self) -> list[float]:
        """Every place's number, summed over all fronts."""
        rows = [self._own.tolist()]
        for path in self._folder.glob("*.f64") if self._folder else ():
            if path != self._path:
                rows.append(memoryview(path.read_bytes()).cast("d").tolist())
        return [sum(column) for column in zip(*rows)]


class Histogram:
    """How often each range of values came, and their sum."""

    def __init__(self, buckets: Sequence[float], store: Store) -> None:
        self.buckets = buckets
        self._cells, self.where = store.take(len(buckets) + 2)

    def observe(self, value: float, times: int = 1) -> None:
        """`times` values that are alike."""
        self._cells[bisect_left(self.buckets, value)] += times
        self._cells[-1] += value * times

    def lines(self, name: str, labels: Mapping[str, str], sums: Sequence[float]) -> Iterator[str]:
        *counts, total = sums[self.where]
        yield from histogram_lines(name, labels, self.buckets, counts, total)


# ---- text


def histogram_lines(
    name: str, labels: Mapping[str, str], buckets: Sequence[float], counts: Sequence[float], total: float
) -> Iterator[str]:
    """counts: of each bucket, not summed up, and one more for what is above all."""
    seen = 0.0
    for edge, count in zip((*buckets, math.inf), counts):
        seen += count
        yield sample(f"{name}_bucket", {**labels, "le": _number(float(edge))}, seen)
    yield sample(f"{name}_count", labels, seen)
    yield sample(f"{name}_sum", labels, total)


def head(name: str, kind: str, help: str) -> Iterator[str]:
    yield f"# HELP {name} {help}"
    yield f"# TYPE {name} {kind}"


def sample(name: str, labels: Mapping[str, str], value: float) -> str:
    """One line."""
    inner = ",".join(f'{k}="{_escaped(v)}"' for k, v in labels.items())
    return f"{name}{{{inner}}} {_number(float(value))}" if inner else f"{name} {_number(float(value))}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    return "+Inf" if value == math.inf else repr(value)
