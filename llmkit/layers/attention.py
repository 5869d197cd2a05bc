"""Attention over the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmkit.attention import Step
from llmkit.layers.linear import Linear
from llmkit.layers.norm import RMSNorm


@dataclass
class Attention:
    """q/k/v from one matrix, then all that the step's back end does (per-head norms, rotary embedding, KV write, paged
    attention), then the output matrix. window: each query sees this many last keys; None sees all. rotary: False in some
    SmolLM3 layers."""

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

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x: [T, hidden] -> [T, hidden]."""
        return self.o(step.attend(self, self.qkv(x)))

    @property
    def norms(self) -> tuple[Tensor, Tensor, float] | None:
        """q and k norm weights [head_dim] and their eps, as the kernels take them."""
        if self.q_norm is None or self.k_norm is None:
            return None
        return self.q_norm.weight, self.k_norm.weight, self.q_norm.eps
