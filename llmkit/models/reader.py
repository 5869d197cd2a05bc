"""Weights from files straight into the tensors that will hold them on a GPU, by several threads.

A mapped file that is copied by one thread reaches the GPU at 4-7 GB/s. Here every thread has two page-locked buffers and a
stream of its own: it reads a piece of a file into one buffer while the other is on its way to the device. Pieces land in slices
of the merged parameters, so no second copy of the weights is ever on the device; other dtypes are converted there.
"""

from __future__ import annotations

import mmap
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llmkit.errors import WeightsError
from llmkit.models.weights import SafetensorsSource, WeightSource
from llmkit.whole_gpu import empty_cache, synchronize

THREADS = 8  # measured on an H100: 4 threads 14-20 GB/s, 8 threads 19-30, 16 threads 19-39
BUFFER = 16 * 2**20  # bytes; two for each thread


class Lane(Protocol):
    """One thread's way to the device. buffers: uint8 [2, size], read into in turn."""

    buffers: Tensor

    def copy(self, slot: int, target: Tensor, source: Tensor) -> None:
        """Begin to copy `source`, a view of buffers[slot], to `target` on the device; another dtype is converted."""
        ...

    def wait(self, slot: int) -> None:
        """Until buffers[slot] may be overwritten."""
        ...

    def close(self) -> None:
        """Wait for everything and let go of the buffers."""
        ...


class CudaLane:
    """Page-locked memory and a stream. The memory is registered by hand: torch's own pinned memory would stay in its cache.
    It is mapped, not allocated, for two lanes must not lock the same page."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.stream = torch.cuda.Stream(device)
        self.events = [torch.cuda.Event() for _ in range(2)]
        memory = mmap.mmap(-1, 2 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.buffers = torch.frombuffer(memory, dtype=torch.uint8).view(2, size)
        self.cuda: Any = torch.cuda.cudart()
        torch.cuda.check_error(self.cuda.cudaHostRegister(self.buffers.data_ptr(), self.buffers.nbytes, 0))

    def copy(self, slot: int, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            self.events[slot].record()

    def wait(self, slot: int) -> None:
        self.events[slot].synchronize()

    def close(self) -> None:
        self.stream.synchronize()
        torch.cuda.check_error(self.cuda.cudaHostUnregister(self.buffers.data_ptr()))


@dataclass(frozen=True)
class Piece:
    """Bytes [start, start + size) of a file, which are `target` in dtype `dtype`; `name` is the tensor's, for errors."""

    file: Path
    start: int
    size: int
    dtype: torch.dtype
    target: Tensor
    name: str


class Reader:
    """Collects what is to be read, then reads it all: `read(...)` any number of times, then `run()` once."""

    def __init__(
        self, source: SafetensorsSource, device: torch.device, lane: Callable[[torch.device, int], Lane] = CudaLane
    ) -> None:
        self.source, self.device, self.lane = source, device, lane
        self.pieces: list[Piece] = []
        self.bytes, self.seconds = 0, 0.0
        self._files: dict[Path, int] = {}

    def read(self, name: str, shape: tuple[int, ...], target: Tensor) -> None:
        """Queue a tensor of `shape`, flattened in the file's order, for `target`: as many elements, strided in any way.

        Its contents are there after `run`. WeightsError when it is missing, unusable, or not of that shape.
        """
        file, start, dtype = self.source.locate(name, shape)
        self._cut(Piece(file, start, target.numel() * dtype.itemsize, dtype, target, name))

    def _cut(self, whole: Piece) -> None:
        """Into pieces that fit a buffer: runs of the first dimension, whose members are contiguous each."""
        target = whole.target.view(-1) if whole.target.is_contiguous() else whole.target
        if not target.numel():
            return
        member = whole.size // len(target)
        if not target[0].is_contiguous() or member > BUFFER:
            for i, part in enumerate(target):
                self._cut(Piece(whole.file, whole.start + i * member, member, whole.dtype, part, whole.name))
            return
        count = BUFFER // member
        for i in range(0, len(target), count):
            part = target[i : i + count]
            self.pieces.append(Piece(whole.file, whole.start + i * member, len(part) * member, whole.dtype, part, whole.name))

    def run(self) -> None:
        """Read everything, in the order of the files. An error or an interrupt ends all threads after their piece."""
        begin = time.perf_counter()
        if self.device.type == "cuda":
            synchronize(self.device)  # whoever had the targets' memory before is done with it
        self.bytes = sum(p.size for p in self.pieces)
        pieces = deque(sorted(self.pieces, key=lambda p: (p.file, p.start)))
        self.pieces = []
        with ExitStack() as stack:
            for file in dict.fromkeys(p.file for p in pieces):
                self._files[file] = os.open(file, os.O_RDONLY)
                stack.callback(os.close, self._files[file])
            self._run_threads(pieces)
        if self.device.type == "cuda":
            empty_cache()  # what conversions and strided copies needed for a moment
        self.seconds = time.perf_counter() - begin

    def _run_threads(self, pieces: deque[Piece]) -> None:
        size = -(-max((p.size for p in pieces), default=1) // mmap.PAGESIZE) * mmap.PAGESIZE
        threads = max(1, min(THREADS, len(pieces) // 2))
        with ThreadPoolExecutor(threads, "llmkit-weights") as pool:
            futures = [pool.submit(self._work, pieces, size) for _ in range(threads)]
            try:
                for future in as_completed(futures):
                    future.result()
            finally:
                pieces.clear()

    def _work(self, pieces: deque[Piece], size: int) -> None:
        """One thread: read a piece into one buffer while the other buffer's is on its way."""
        lane, slot = self.lane(self.device, size), 0
        try:
            while piece := _next(pieces):
                lane.wait(slot)
                data = lane.buffers[slot, : piece.size]
                self._fill(data, piece)
                lane.copy(slot, piece.target, data.view(piece.dtype).view(piece.target.shape))
                slot = 1 - slot
        finally:
            lane.close()

    def _fill(self, data: Tensor, piece: Piece) -> None:
        """Read the piece's bytes into `data`. The GIL is free meanwhile."""
        room, done = memoryview(data.numpy().data), 0
        while done < piece.size:
            try:
                got = os.preadv(self._files[piece.file], [room[done:]], piece.start + done)
            except OSError as error:
                raise WeightsError(
                    f"{piece.file}: tensor {piece.name!r} cannot be read: {error.strerror}", "check the disk"
                ) from error
            if not got:
                raise WeightsError(
                    f"{piece.file}: the file is truncated inside tensor {piece.name!r}: it ends at byte {piece.start + done}",
                    "download it again",
                )
            done += got

    def __str__(self) -> str:
        return f"{self.bytes / 1e9:.2f} GB read in {self.seconds:.2f} s, {self.bytes / max(self.seconds, 1e-9) / 1e9:.1f} GB/s"


def _next(pieces: deque[Piece]) -> Piece | None:
    try:
        return pieces.popleft()
    except IndexError:
        return None


def fast_reader(source: WeightSource, device: torch.device) -> Reader | None:
    """A reader for weights in files that go to an NVIDIA GPU; None where mapping and copying is the way."""
    fits = device.type == "cuda" and torch.version.cuda is not None and hasattr(os, "preadv")
    return Reader(source, device) if fits and isinstance(source, SafetensorsSource) else None
