"""Attention in torch on a GPU, over the blocks where they lie: one call of varlen_attn for all sequences of a step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from llmkit_kernels import reference
from torch import Tensor

from llmkit.attention.choice import paged_varlen
from llmkit.attention.reference import ReferenceBackend, ReferenceStep
from llmkit.engine.batch import Batch
from llmkit.layers.attention import Attention
from llmkit.layers.rotary import RotaryEmbedding
from llmkit.transfer import send


class VarlenBackend(ReferenceBackend):
    """As its parent, without plans: the block table says it all."""

    name = "torch varlen_attn"

    def __init__(self, kv_cache: Tensor, rotary: RotaryEmbedding, windows: set[int | None]) -> None:
        super().__init__(kv_cache, rotary, windows)
        attend = paged_varlen()
        assert attend is not None  # `choose` has looked
        self.varlen = attend

    def prepare(self, batch: Batch, positions: Tensor, slot_mapping: Tensor) -> VarlenStep:
        def sent(values: np.ndarray) -> Tensor:
            return send(values.astype(np.int32), self.kv_cache.device)

        return VarlenStep(
            *self.rotary.at(positions),
            rows=reference.kv_rows(slot_mapping, self.layout.kv_heads, self.layout.block_size),
            plans={},
            kv_cache=self.kv_cache,
            backend=self,
            cu_seqlens=sent(batch.cu_seqlens),
            contexts=sent(batch.context_lens),
            block_tables=sent(batch.block_tables),
            longest=(int(batch.num_new.max()), int(batch.context_lens.max())),
        )


@dataclass(slots=True)
class VarlenStep(ReferenceStep):
    """cu_seqlens int32 [S+1], contexts int32 [S], block_tables int32 [S, blocks]. longest: new tokens and context of any."""

    backend: VarlenBackend
    cu_seqlens: Tensor
    contexts: Tensor
    block_tables: Tensor
    longest: tuple[int, int]

    def _attend(self, layer: Attention, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return self.backend.varlen(
            q, k_cache.transpose(1, 2), v_cache.transpose(1, 2), self.cu_seqlens, None, *self.longest,
            scale=layer.head_dim**-0.5, window_size=(layer.window - 1 if layer.window else -1, 0), enable_gqa=True,
            seqused_k=self.contexts, block_table=self.block_tables,
        )  # fmt: skip
