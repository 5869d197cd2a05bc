"""Numbers that Prometheus can read: where they are kept, and how they are written.

All numbers of one front lie in one row of float64. Several fronts have their rows in one file, and each of them answers a scrape
with the sums, for a scrape meets any of them.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


SIZE = 8192  # numbers of one front


@dataclass(frozen=True)
class Shared:
    """A file of `count` rows, open as `file`: front `number` writes its own and reads all."""

    file: int
    number: int
    count: int

    @staticmethod
    def create(count: int) -> IO[bytes]:
        """The file, all zeros; gone with the last process that has it open."""
        file = tempfile.TemporaryFile()  # noqa: SIM115  # its owner closes it
        file.truncate(8 * SIZE * count)
        return file


class Store:
    """A row of SIZE numbers, handed out as slices; with `shared` one of several, which are summed up."""

    def __init__(self, shared: Shared | None = None) -> None:
        self.shared, self._used = shared, 0
        number, count = (shared.number, shared.count) if shared else (0, 1)
        memory = mmap.mmap(shared.file if shared else -1, 8 * SIZE * count)
        rows = memoryview(memory).cast("d")
        self._rows: list[memoryview[float]] = [rows[i * SIZE : (i + 1) * SIZE] for i in range(count)]
        self._own = self._rows[number]

    def take(self, count: int) -> tuple[memoryview[float], slice]:
        """A view of the next `count` numbers, and where they lie."""
        where = slice(self._used, self._used + count)
        if where.stop > SIZE:
            raise IndexError(f"a front has {SIZE} numbers, and {where.stop} are wanted")
        self._used = where.stop
        return self._own[where], where

    def sums(self) -> list[float]:
        """Every number, summed over all fronts."""
        return [sum(column) for column in zip(*(row.tolist() for row in self._rows))]


class Histogram:
    """How often each range of values came, and their sum."""

    def __init__(self, buckets: Sequence[float], store: Store) -> None:
        self.buckets = buckets
        self._cells, self.where = store.take(len(buckets) + 2)

    def observe(self, value: float, times: int = 1) -> None:
        """`times` values that are alike."""
        self._cells[bisect_left(self.buckets, value)] += times
        self._cells[-1] += value * times

    def lines(self, name: str, labels: Mapping[str, str], sums: Sequence[float], most: float = math.inf) -> Iterator[str]:
        """most: buckets above it are not shown."""
        *counts, total = sums[self.where]
        yield from histogram_lines(name, labels, self.buckets, counts, total, most)


# ---- text


def histogram_lines(
    name: str, labels: Mapping[str, str], buckets: Sequence[float], counts: Sequence[float], total: float, most: float = math.inf
) -> Iterator[str]:
    """counts: of each bucket, not summed up, and one more for what is above all. most: of the buckets shown, besides +Inf."""
    seen = 0.0
    for edge, count in zip((*buckets, math.inf), counts):
        seen += count
        if edge <= most or edge == math.inf:
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
