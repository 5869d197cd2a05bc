"""Root-mean-square normalisation."""

from __future__ import annotations

from torch import Tensor

from llmkit import ops


class RMSNorm:
    """y = x / rms(x) · weight over the last dimension; `eps` as in config.json."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm of residual + x, residual + x); without a residual x begins it. The residual may be updated in place."""
        return ops.add_rms_norm(x, residual, self.weight, self.eps)
