"""Attention with flash_attn for prompts; sequences that decode stay with our kernels."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from torch import Tensor

from llmkit.attention.choice import flash_attention
from llmkit.attention.triton import TritonBackend, TritonStep
from llmkit.engine.batch import Batch
from llmkit.layers.attention import Attention
from llmkit.layers.rotary import RotaryEmbedding
from llmkit.transfer import send


class FlashBackend(TritonBackend):
    """As its parent, but for the runs of prompt tokens."""

    name = "flash_attn"

    def __init__(self, kv_cache: Tensor, rotary: RotaryEmbedding, heads: int) -> None:
        super().__init__(kv_cache, rotary, heads)
        self.attend = flash_attention()

    def prepare(self, batch: Batch, positions: Tensor, slot_mapping: Tensor) -> TritonStep:
        step = super().prepare(batch, positions, slot_mapping)
        if step.runs is None:
            return step
        own = {f.name: getattr(step, f.name) for f in fields(step)}
        first = step.runs.first
        contexts = batch.context_lens[first:]
        ends = send(np.concatenate(([0], np.cumsum(contexts))).astype(np.int32), self.kv_cache.device)
        longest = int(batch.num_new[first:].max()), int(contexts.max())
        return FlashStep(**own, backend=self, key_ends=ends, longest=longest)


@dataclass(slots=True)
class FlashStep(TritonStep):
    """key_ends: int32 [P+1], where each run's keys would begin if they lay end to end. longest: run and context, in tokens."""

    backend: FlashBackend
    key_ends: Tensor
    longest: tuple[int, int]

    def _attend_runs(self, layer: Attention, q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor) -> None:
        assert self.runs is not None  # or `prepare` would have made a plain step
        attended = self.backend.attend(
            q, k_cache.transpose(1, 2), v_cache.transpose(1, 2), self.runs.cu_seqlens, self.key_ends, *self.longest,
            softmax_scale=layer.head_dim**-0.5, causal=True, window_size=(layer.window - 1 if layer.window else -1, 0),
            block_table=self.runs.block_tables,
        )  # fmt: skip
        out.copy_(attended)
