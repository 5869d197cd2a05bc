"""One step's work as flat arrays: what the runner copies to the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmkit.engine.rows import Rows


@dataclass(frozen=True)
class Batch:
    """T tokens of S sequences, the `num_decodes` that compute just their last token first.

    rows: int64 [S]. num_new: int32 [S], tokens of each. context_lens: int32 [S], keys after the step. cu_seqlens: int64 [S+1].
    input_ids, positions, slot_mapping: int64 [T]. block_tables: int32 [S, most blocks any holds].
    sampled: int64 [R], which of the S sequences get a token in this step (all but unfinished prompts and embeddings).
    """

    rows: np.ndarray
    num_new: np.ndarray
    context_lens: np.ndarray
    cu_seqlens: np.ndarray
    input_ids: np.ndarray
    positions: np.ndarray
    slot_mapping: np.ndarray
    block_tables: np.ndarray
    sampled: np.ndarray
    num_decodes: int

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def last_tokens(self) -> np.ndarray:
        """Where among the T tokens the logits of the sampled sequences are, int64 [R]."""
        return self.cu_seqlens[self.sampled + 1] - 1

    def learn(self, rows: np.ndarray, token_ids: np.ndarray) -> None:
        """Fill in what a step that was launched ahead began with: `token_ids` int64 [R], just chosen for `rows` int64 [R]."""
        newest, decodes = dict(zip(rows.tolist(), token_ids.tolist())), slice(self.num_decodes)
        known = self.input_ids[decodes].tolist()
        self.input_ids[decodes] = [newest.get(row, token) for row, token in zip(self.rows[decodes].tolist(), known)]


def build_batch(rows: Rows, chosen: np.ndarray, num_new: np.ndarray, num_decodes: int) -> Batch:
    """Lay out the step that computes `num_new` int32 [S] tokens of each of the rows `chosen` int64 [S]. Pending ones are unknown
    among the input ids until `learn`; the device knows them."""
    computed = rows.num_computed[chosen]
    cu_seqlens = np.concatenate(([0], np.cumsum(num_new, dtype=np.int64)))
    sequence = np.repeat(np.arange(len(chosen)), num_new)
    positions = np.arange(cu_seqlens[-1]) - cu_seqlens[sequence] + computed[sequence]
    row = chosen[sequence]
    block = rows.block_table[row, positions // rows.block_size].astype(np.int64)
    context = computed + num_new
    return Batch(
        rows=chosen,
        num_new=num_new,
        context_lens=context,
        cu_seqlens=cu_seqlens,
        input_ids=rows.token_ids[row, positions].astype(np.int64),
        positions=positions,
        slot_mapping=block * rows.block_size + positions % rows.block_size,
        block_tables=rows.block_table[chosen, : int(rows.num_blocks[chosen].max())],
        sampled=np.flatnonzero((context == rows.num_coming(chosen)) & ~rows.pooled[chosen]),
        num_decodes=num_decodes,
    )
