"""Attention in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from llmkit_kernels import reference
from torch import Tensor

from llmkit.engine.batch import Batch
from llmkit.layers.attention import Attention
from llmkit.layers.rotary import RotaryEmbedding


class ReferenceBackend:
    """Plans a step with numpy, once per window size; see `llmkit_kernels.reference`."""

    name = "torch"

    def __init__(self, kv_cache: Tensor, rotary: RotaryEmbedding, windows: set[int | None]) -> None:
        self.kv_cache, self.rotary, self.windows = kv_cache, rotary, windows
        kv_heads, block_size = kv_cache.shape[3:5]
        self.layout = reference.CacheLayout(kv_heads, block_size, rotary.cos.dtype, kv_cache.device)

    def prepare(self, batch: Batch, positions: Tensor, slot_mapping: Tensor) -> ReferenceStep:
        lengths = (batch.cu_seqlens, batch.context_lens, batch.block_tables)
        return ReferenceStep(
            *self.rotary.at(positions),
            rows=reference.kv_rows(slot_mapping, self.layout.kv_heads, self.layout.block_size),
            plans={window: reference.plan_attention(*lengths, window, self.layout) for window in self.windows},
            kv_cache=self.kv_cache,
        )


@dataclass(slots=True)
class ReferenceStep:
    """cos, sin: [T, 1, R]. rows: where the step's tokens store their keys. plans: one per distinct window size."""

    cos: Tensor
    sin: Tensor
    rows: Tensor
    plans: dict[int | None, reference.AttentionPlan]
    kv_cache: Tensor

    def attend(self, layer: Attention, qkv: Tensor) -> Tensor:
        """As `Step.attend`."""
        heads, kv_heads, dim = layer.num_heads, layer.num_kv_heads, layer.head_dim
        qkv = qkv.view(qkv.shape[0], heads + 2 * kv_heads, dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if layer.q_norm and layer.k_norm:
            qk = torch.cat((layer.q_norm(qk[:, :heads]), layer.k_norm(qk[:, heads:])), dim=1)
        if layer.rotary:
            qk = reference.rotate(qk, self.cos, self.sin)
        q, k = qk[:, :heads], qk[:, heads:]
        k_cache, v_cache = self.kv_cache[layer.layer].unbind(0)
        reference.write_kv(k, v, k_cache, v_cache, self.rows)
        return self._attend(layer, q, k, v, k_cache, v_cache).reshape(qkv.shape[0], heads * dim)

    def _attend(self, layer: Attention, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """q [T, H, D] over what is cached, the step's own keys and values among it -> [T, H, D]."""
        return reference.paged_attention(q, k, v, k_cache, v_cache, self.plans[layer.window], layer.head_dim**-0.5)
