"""Attention over the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmkit import ops
from llmkit.layers.linear import Linear
from llmkit.layers.norm import RMSNorm


@dataclass(slots=True)
class StepContext:
    """What every layer of one step shares. cos, sin: [T, 1, R]. kv_rows: where the step's tokens store their keys. plans: one
    attention plan per distinct window size. kv_cache: [layers, 2, num_blocks, G, block_size, D]."""

    cos: Tensor
    sin: Tensor
    kv_rows: Tensor
    plans: dict[int | None, ops.AttentionPlan]
    kv_cache: Tensor


@dataclass
class Attention:
    """q/k/v from one matrix, optional per-head norms (Qwen3), rotary embedding, KV write, paged attention, output matrix."""

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv: Linear
    o: Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    window: int | None
    rotary: bool

    def __call__(self, x: Tensor, step: StepContext) -> Tensor:
        """x: [T, hidden] -> [T, hidden]."""
        heads, kv_heads, dim = self.num_heads, self.num_kv_heads, self.head_dim
        qkv = self.qkv(x).view(x.shape[0], heads + 2 * kv_heads, dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if self.q_norm and self.k_norm:
            qk = torch.cat((self.q_norm(qk[:, :heads]), self.k_norm(qk[:, heads:])), dim=1)
        if self.rotary:
            qk = ops.rotate(qk, step.cos, step.sin)
        q, k = qk[:, :heads], qk[:, heads:]
        k_cache, v_cache = step.kv_cache[self.layer].unbind(0)
        ops.write_kv(k, v, k_cache, v_cache, step.kv_rows)
        out = ops.paged_attention(q, k, v, k_cache, v_cache, step.plans[self.window], dim**-0.5)
        return self.o(out.reshape(x.shape[0], heads * dim))
