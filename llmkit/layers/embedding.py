"""Token ids to vectors, and vectors to logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llmkit.layers.linear import Linear


class Embedding:
    """weight [vocab, hidden]; int64 ids [T] -> [T, hidden]."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class LMHead:
    """hidden [R, hidden] -> logits float32 [R, vocab], in `out` if it is given; float32 so that sampling never rounds."""

    def __init__(self, weight: Tensor) -> None:
        self.project = Linear(weight)

    def __call__(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        return self.project.in_float32(hidden, out)
