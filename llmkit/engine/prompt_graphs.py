"""Small steps of prompts alone as CUDA graphs: what a person waits for who asks an idle engine.

At a hundred tokens the GPU needs some 5 ms and the host, launching kernel after kernel, twice that. Everything a step differs in
lies in two buffers, filled by one copy each; token counts are padded to the next size with a sequence of nobody, which lives in
the padding block. It attends as others do: what nobody computes would be left over in memory, might be NaN, and a NaN that is
written to the padding block reaches everybody, since a masked NaN is still a NaN.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llmkit_kernels.prefill_attention import QUERY_TILE
from torch import Tensor

from llmkit.attention.triton import PromptRuns, TritonBackend, TritonStep
from llmkit.engine.batch import Batch
from llmkit.engine.graphs import DeviceRows, capture
from llmkit.transfer import fill

TOKENS = [32, 64, 128, 256, 512]
SEQUENCES = 4  # at most


class PromptGraphs:
    """Captured prompt steps by token count, and by how tokens are drawn (`work`).

    body: (ids int64 [T], step, last int64 [S], rows int64 [S], work) -> (token ids [S], logits fp32 [S, vocabulary]).
    """

    def __init__(
        self, body: Callable[[Tensor, TritonStep, Tensor, Tensor, Any], tuple[Tensor, Tensor]], backend: TritonBackend,
        state: DeviceRows,
    ) -> None:  # fmt: skip
        self.body, self.backend, self.state = body, backend, state
        self.blocks = state.block_table.shape[1]
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        device = state.position.device
        self._wide = torch.zeros(3 * TOKENS[-1] + 3 * SEQUENCES, dtype=torch.int64, device=device)
        self._narrow = torch.zeros(sum(self._sizes(TOKENS[-1])), dtype=torch.int32, device=device)

    @staticmethod
    def fits(batch: Batch) -> bool:
        """Whether the step is small enough, and of prompts alone."""
        return not batch.num_decodes and len(batch.rows) <= SEQUENCES and batch.num_tokens <= TOKENS[-1]

    def run(self, batch: Batch, work: int) -> tuple[Tensor, Tensor]:
        """(token ids [S], logits [S, vocabulary]) of the sequences; those of unfinished prompts mean nothing. The next step
        overwrites both."""
        size = TOKENS[bisect.bisect_left(TOKENS, batch.num_tokens)]
        wide, narrow = self._lay_out(batch, size)
        fill(self._narrow[: len(narrow)], narrow)
        fill(self._wide[: len(wide)], wide)
        if (size, work) not in self._graphs:
            self._wide[len(wide) - 2 * SEQUENCES : len(wide) - SEQUENCES] = self.state.num_rows  # capturing draws for nobody
            self._graphs[size, work] = capture(lambda: self._compute(size, work), self.state.side)
            fill(self._wide[: len(wide)], wide)
        graph, token_ids, logits = self._graphs[size, work]
        graph.replay()
        return token_ids[: len(batch.rows)], logits[: len(batch.rows)]

    def _sizes(self, tokens: int) -> tuple[int, int, int, int, int]:
        """Of the parts of the int32 buffer. The last sequence is the padding's."""
        tiles = tokens // QUERY_TILE + SEQUENCES + 1
        return SEQUENCES + 2, SEQUENCES + 1, tiles, tiles, (SEQUENCES + 1) * self.blocks

    def _lay_out(self, batch: Batch, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The buffers' contents: ids, positions, slots, last tokens, rows and where the newest token of each stands, int64; then
        cu_seqlens, context lengths, tiles and block tables, int32."""
        count, tokens = len(batch.rows), batch.num_tokens
        wide, narrow = np.zeros(3 * size + 3 * SEQUENCES, np.int64), np.zeros(sum(self._sizes(size)), np.int32)
        wide[: 3 * size].reshape(3, size)[:, :tokens] = batch.input_ids, batch.positions, batch.slot_mapping
        last, rows, newest = wide[3 * size :].reshape(3, SEQUENCES)
        last[:count] = batch.cu_seqlens[1:] - 1
        rows[:] = self.state.num_rows
        rows[batch.sampled] = batch.rows[batch.sampled]
        newest[batch.sampled] = batch.context_lens[batch.sampled] - 1
        ends, contexts, sequence, first, tables = np.split(narrow, np.cumsum(self._sizes(size))[:-1])
        ends[:], ends[: count + 1], ends[-1] = tokens, batch.cu_seqlens, size
        contexts[:count], contexts[-1] = batch.context_lens, size - tokens
        counts = -(-batch.num_new // QUERY_TILE)
        padded = len(sequence) - counts.sum()
        sequence[:] = np.repeat([*range(count), SEQUENCES], [*counts, padded])
        first[:] = np.concatenate([np.arange(n) * QUERY_TILE for n in (*counts, padded)])
        tables.reshape(-1, self.blocks)[:count, : batch.block_tables.shape[1]] = batch.block_tables
        return wide, narrow

    def _compute(self, size: int, work: int) -> tuple[Tensor, Tensor]:
        wide = self._wide[: 3 * size + 3 * SEQUENCES]
        ids, positions, slots = wide[: 3 * size].view(3, size).unbind(0)
        last, rows, newest = wide[3 * size :].view(3, SEQUENCES).unbind(0)
        ends, contexts, sequence, first, tables = self._narrow[: sum(self._sizes(size))].split(self._sizes(size))
        self.state.position[rows] = newest
        runs = PromptRuns(ends, contexts, (sequence, first))
        step = self.backend.step(positions, slots, tables.view(-1, self.blocks), 0, None, runs)
        return self.body(ids, step, last, rows, work)
