"""Linear layers."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkit import ops


class Linear:
    """y = x Wᵀ + b for x [T, in], W [out, in]. The weight is handed over for good: it may be packed for this machine, and then
    `weight` is None."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.run, self.weight = ops.linear(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x)

    def in_float32(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x Wᵀ as float32 [T, out], in `out` if it is given; on a GPU it is never rounded to the weight's dtype."""
        if self.weight is None or not x.is_cuda or x.dtype == torch.float32:
            y = self.run(x).float()
            return y if out is None else out.copy_(y)
        return torch.mm(x, self.weight.t(), out_dtype=torch.float32, out=out)
