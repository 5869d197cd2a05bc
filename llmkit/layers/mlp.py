"""The gated feed-forward block."""

from __future__ import annotations

from torch import Tensor

from llmkit import ops
from llmkit.layers.linear import Linear


class GatedMLP:
    """down(silu(gate(x)) · up(x)), with gate and up merged into one matrix [2·I, hidden]: all gate rows first, or, where our
    kernels read them, in pairs of one gate and one up row."""

    def __init__(self, gate_up: Linear, pairs: bool, down: Linear) -> None:
        self.gate_up, self.down, self.pairs = gate_up, down, pairs
        self.activated = ops.gate_up_silu(gate_up.run, gate_up.weight, gate_up.bias, pairs)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.activated(x))
