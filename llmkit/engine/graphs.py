"""Decode steps on a GPU as CUDA graphs: one launch instead of some two hundred.

A step's inputs are the rows that take part; everything else it needs lives on the device, one entry a row, and the step itself
brings it forward: the last token, the position, the block table, how to sample. So the host sends a handful of row numbers, and
a block table only when it has grown. Graphs are captured when a size is first needed; a batch is padded to the next size with a
row that nobody owns.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from llmkit_kernels.filters import NO_LIMIT, Cuts
from torch import Tensor

from llmkit.transfer import fill, send_all
from llmkit.whole_gpu import capturing

T = TypeVar("T")
SIZES = [1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, *range(80, 257, 16), *range(288, 1025, 32)]


class DeviceRows:
    """State of the running requests on the device. Row `num_rows` belongs to nobody: padding computes there.

    last_token, position (where that token stands), seed: int64. temperature: fp32, 0 = greedy. cuts: who may be drawn.
    block_table: int32 [rows, blocks].
    """

    def __init__(self, num_rows: int, max_blocks: int, device: torch.device) -> None:
        self.num_rows = num_rows
        self._wide = torch.zeros(3, num_rows + 1, dtype=torch.int64, device=device)
        self._narrow = torch.zeros(4, num_rows + 1, dtype=torch.int32, device=device)
        self.last_token, self.position, self.seed = self._wide.unbind(0)
        temperature, top_k, top_p, furthest = self._narrow.unbind(0)
        self.temperature, self.cuts = temperature.view(torch.float32), Cuts(top_k, top_p.view(torch.float32), furthest)
        self.cuts.top_k[:], self.cuts.top_p[:], self.cuts.furthest[:] = NO_LIMIT, 1, NO_LIMIT
        self.block_table = torch.zeros(num_rows + 1, max_blocks, dtype=torch.int32, device=device)
        self.side = torch.cuda.Stream() if device.type == "cuda" else None  # where graphs are captured

    def admit(self, rows: np.ndarray, wide: np.ndarray, narrow: np.ndarray) -> Tensor:
        """New owners of these rows, int64 [n], which are returned on the device. wide: last_token, position and seed, int64
        [3, n]; narrow: temperature, top-k, top-p and furthest, int32 [4, n], the bits of what is fp32."""
        at, wide_there, narrow_there = send_all((rows, wide, narrow), self._wide.device)
        self._wide[:, at], self._narrow[:, at] = wide_there, narrow_there
        return at

    def update_tables(self, rows: np.ndarray, tables: np.ndarray) -> None:
        """Send the block tables, int32 [n, blocks], of the rows where they have changed."""
        at, there = send_all((rows, tables), self.block_table.device)
        self.block_table[at] = there


def capture(body: Callable[[], T], side: torch.cuda.Stream | None, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, T]:
    """Run the body once, so that kernels are compiled and workspaces there, then record it: (graph, what the body returned).

    side: the one stream for all of this, because cuBLAS keeps a workspace of 32 MiB for every stream it has seen. Other threads
    may go on, but not capture, nor wait for the whole device, with which captures begin: this one would not survive it.
    """
    if side is None:
        raise RuntimeError("only a GPU captures graphs")
    graph, usual = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    with capturing:
        side.wait_stream(usual)
        with torch.cuda.stream(side):
            body()
        usual.wait_stream(side)
        try:
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                results = body()
        except BaseException:
            torch.cuda.set_stream(usual)  # torch leaves the other one where it cannot end a capture
            raise
    return graph, results


class DecodeGraphs:
    """Captured decode steps by batch size.

    body: (rows int64 [B], work) -> (token ids int64 [B], logits fp32 [B, vocabulary]); reads and advances the device rows.
    work: a number that says how tokens are drawn; a graph is good for one. capture_seconds: what capturing each graph took.
    compile: prepares for a body that will run. It is given the smaller sizes, too, through which a batch shrinks as its requests
    end: their kernels are compiled side by side, rather than one size after the other.
    """

    def __init__(
        self, body: Callable[[Tensor, Any], tuple[Tensor, Tensor]], state: DeviceRows, max_size: int, eager: bool,
        compile: Callable[[Callable[[], object]], None],
    ) -> None:  # fmt: skip
        self.body, self.state, self.eager, self.compile = body, state, eager, compile
        self.sizes = [s for s in SIZES if s < max_size] + [max_size]
        self.rows = torch.full((max_size,), state.num_rows, dtype=torch.int64, device=state.position.device)
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]] = {}
        self.capture_seconds: dict[tuple[int, int], float] = {}
        self._prepared: set[tuple[int, int]] = set()
        self._pool = None
        self._loaded = np.empty(0, np.int64)

    def run(self, rows: np.ndarray, work: int) -> tuple[Tensor, Tensor]:
        """One step of these rows, int64 [B]: (token ids [B], logits [B, vocabulary]); both are overwritten by the next step."""
        count = len(rows)
        size = self.sizes[bisect.bisect_left(self.sizes, count)]
        self._load(rows, size)
        if self.eager:
            token_ids, logits = self.body(self.rows[:size], work)
        else:
            if (size, work) not in self._graphs:
                self._graphs[size, work] = self._capture(size, work)
            graph, (token_ids, logits) = self._graphs[size, work]
            graph.replay()
        return token_ids[:count], logits[:count]

    def _load(self, rows: np.ndarray, size: int) -> None:
        padded = np.concatenate((rows, np.full(size - len(rows), self.state.num_rows, np.int64)))
        if not np.array_equal(padded, self._loaded):
            fill(self.rows[:size], padded)
            self._loaded = padded

    def _capture(self, size: int, work: int) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]:
        """On rows that nobody owns."""
        begin = time.perf_counter()
        keep = self.rows[:size].clone()
        self.rows[:size] = self.state.num_rows
        try:
            self._prepare(size, work)
            captured = capture(lambda: self.body(self.rows[:size], work), self.state.side, self._pool)
        finally:
            self.rows[:size] = keep
        self._pool = self._pool or captured[0].pool()
        self.capture_seconds[size, work] = time.perf_counter() - begin
        return captured

    def _prepare(self, size: int, work: int) -> None:
        """Compile for this size and for those below, unless that has been done."""
        new = [s for s in self.sizes if s <= size and (s, work) not in self._prepared]

        def steps() -> None:
            for s in new:
                self.body(self.rows[:s], work)

        if size in new:
            self.compile(steps)
            self._prepared.update((s, work) for s in new)
