"""Steps with prompts as CUDA graphs, decodes among them or not, as far as their hidden states.

Launching kernel after kernel, the host needs 5 to 25 ms for a step: more than the GPU for a short prompt, more even for a step of
a thousand tokens of a small model. Everything a step differs in lies in one buffer, filled by one copy; its counts are padded to
the next sizes. Padding tokens belong to a run that has no keys: what they attend to is zeros, for what nobody computes would be
left over in memory and might be NaN. Padding decodes are of the row that nobody owns.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from llmkit_kernels.prefill_attention import QUERY_TILE, query_tiles
from torch import Tensor

from llmkit.attention.triton import PromptRuns, TritonBackend, TritonStep
from llmkit.engine.batch import Batch
from llmkit.engine.graphs import DeviceRows, capture
from llmkit.engine.memory import GRAPH_TOKENS
from llmkit.transfer import cut, fill

TOKENS = [32, 64, 128, *range(256, GRAPH_TOKENS + 1, 128)]
DECODES = [0, 16, 64, 256, 512]
PROMPTS = [4, 32, 128]


class Size(NamedTuple):
    """What a graph has room for: tokens, of which the first are decodes, and runs of prompt tokens."""

    tokens: int
    decodes: int
    prompts: int

    @property
    def tiles(self) -> int:
        """Of queries: each run, and the padding's, may begin one."""
        return self.tokens // QUERY_TILE + self.prompts + 1

    @property
    def wide(self) -> tuple[int, ...]:
        """int64 numbers of each part: ids, positions and slots; rows, decodes' first, and where these stand."""
        return self.tokens, self.tokens, self.tokens, self.decodes + self.prompts + 1, self.decodes

    @property
    def narrow(self) -> tuple[int, ...]:
        """int32 numbers of each part: cu_seqlens, context lengths, tiles' runs and first queries; one or none to make it even."""
        parts = self.prompts + 2, self.prompts + 1, self.tiles, self.tiles
        return *parts, sum(parts) % 2

    @property
    def numbers(self) -> int:
        """int64 numbers of all, two narrow ones in each."""
        return sum(self.wide) + sum(self.narrow) // 2


def size_of(batch: Batch, most: int = GRAPH_TOKENS) -> Size | None:
    """The smallest that the step fits; None for one of decodes alone, or too large: of more than `most` tokens, say."""
    decodes, tokens = _next(DECODES, batch.num_decodes), batch.num_tokens
    prompts = _next(PROMPTS, len(batch.rows) - batch.num_decodes)
    if batch.num_decodes == len(batch.rows) or decodes is None or prompts is None:
        return None
    tokens = _next(TOKENS, max(tokens, decodes))
    return None if tokens is None or tokens > most else Size(tokens, decodes, prompts)


def _next(sizes: Sequence[int], count: int) -> int | None:
    at = bisect.bisect_left(sizes, count)
    return sizes[at] if at < len(sizes) else None


class PromptGraphs:
    """Captured steps by size.

    body: (ids int64 [T], step) -> hidden states [T, hidden]; reads the device rows and changes none. hidden: where all graphs
    leave these, for each would else keep its own; None: capture nothing, but compute the same.
    """

    def __init__(
        self, body: Callable[[Tensor, TritonStep], Tensor], backend: TritonBackend, state: DeviceRows, hidden: Tensor | None
    ) -> None:
        self.body, self.backend, self.state, self.hidden = body, backend, state, hidden
        self._graphs: dict[Size, torch.cuda.CUDAGraph] = {}
        self._pool = None
        largest = Size(TOKENS[-1], DECODES[-1], PROMPTS[-1])
        self._numbers = torch.zeros(largest.numbers, dtype=torch.int64, device=state.position.device)

    def load(self, batch: Batch, size: Size) -> None:
        """Send what a step that fits `size` differs in; decodes' tokens and everybody's block tables are in the device rows."""
        fill(self._numbers[: size.numbers], lay_out(batch, size, self.state.num_rows))

    def run(self, size: Size) -> Tensor:
        """The step that was loaded: hidden states [size.tokens, hidden]; the next step overwrites them."""
        if self.hidden is None:
            return self.compute(size)
        hidden = self.hidden[: size.tokens]
        if size not in self._graphs:
            self._graphs[size], _ = capture(lambda: hidden.copy_(self.compute(size)), self.state.side, self._pool)
            self._pool = self._pool or self._graphs[size].pool()
        self._graphs[size].replay()
        return hidden

    def compute(self, size: Size) -> Tensor:
        """As `run`, launched kernel by kernel."""
        wide, narrow = self._numbers[: size.numbers].split([sum(size.wide), sum(size.narrow) // 2])
        ids, positions, slots, rows, standing = wide.split(size.wide)
        ends, contexts, run, first, _ = narrow.view(torch.int32).split(size.narrow)
        tables, decodes, n = self.state.block_table[rows], None, size.decodes
        if n:
            known = self.state.last_token[rows[:n]]
            ids[:n] = torch.where(rows[:n] == self.state.num_rows, ids[:n], known)  # padding decodes have prompt tokens' places
            decodes = self.backend.decodes(standing, tables[:n], None)
        runs = PromptRuns(0, ends, contexts, (run, first), tables[n:])
        return self.body(ids, self.backend.step(positions, slots, decodes, runs))


def lay_out(batch: Batch, size: Size, nobody: int) -> np.ndarray:
    """The buffer's contents, int64 [size.numbers]. nobody: the row of padding."""
    numbers = np.zeros(size.numbers, np.int64)
    n, tokens = batch.num_decodes, batch.num_tokens
    count = len(batch.rows) - n
    ids, positions, slots, rows, standing = cut(numbers, size.wide)
    ids[:tokens], positions[:tokens], slots[:tokens] = batch.input_ids, batch.positions, batch.slot_mapping
    rows[:] = nobody
    rows[:n], rows[size.decodes : size.decodes + count] = batch.rows[:n], batch.rows[n:]
    standing[:n] = batch.positions[:n]
    ends, contexts, run, first, _ = cut(numbers[sum(size.wide) :].view(np.int32), size.narrow)
    ends[:], ends[: count + 1], ends[-1] = tokens, batch.cu_seqlens[n:], size.tokens
    contexts[:count] = batch.context_lens[n:]
    tiles = query_tiles(batch.num_new[n:])
    real = tiles.shape[1]
    run[:real], first[:real] = tiles
    run[real:], first[real:] = size.prompts, np.arange(len(run) - real) * QUERY_TILE  # the padding's, also those beyond its end
    return numbers
