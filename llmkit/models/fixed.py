"""The forward pass of `deterministic=True`: every row's numbers have the same bits whatever stands beside it.

Batch of 1 or of 128, prompt in one piece, in chunks, or found in the prefix cache: products cut K at places that depend on the
weight and the GPU alone, attention adds its keys up in chunks at fixed places, and every other kernel (norms, rotation) is the
same one for decoding and for prompts, one program a row.
"""

from __future__ import annotations

from llmkit_kernels import fixed_gemm
from llmkit_kernels.prepared import PreparedWeight
from torch import Tensor

from llmkit.attention.fixed import FixedStep
from llmkit.attention.triton import TritonStep
from llmkit.models.fused import FusedForward


class FixedForward(FusedForward):
    """Steps of any kind and size go the one way."""

    def decode(self, tokens: Tensor, rows: Tensor, step: TritonStep, out: Tensor) -> Tensor:
        """As its parent."""
        assert isinstance(step, FixedStep)  # of the back end that goes with this
        return self.logits(self._layers(tokens, rows, step.attend_all), out)

    def forward(self, input_ids: Tensor, step: TritonStep) -> Tensor:
        """As `Decoder.forward`."""
        assert isinstance(step, FixedStep)
        return self._layers(input_ids, None, step.attend_all)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """As its parent."""
        return fixed_gemm.logits(hidden, self.head, out)

    @staticmethod
    def _gate_up(x: Tensor, weight: PreparedWeight) -> Tensor:
        return fixed_gemm.gate_up_silu(x, weight)

    @staticmethod
    def _product(x: Tensor, weight: PreparedWeight) -> Tensor:
        return fixed_gemm.product(x, weight)
