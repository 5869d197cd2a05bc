"""The gated feed-forward block."""

from __future__ import annotations

from torch import Tensor

from llmkit import ops
from llmkit.layers.linear import Linear


class GatedMLP:
    """down(silu(gate(x)) · up(x)), with gate and up merged into one matrix [2·I, hidden]."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up, self.down = gate_up, down

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(ops.silu_mul(self.gate_up(x)))
