"""From the hidden states of a prompt to one vector: an embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmkit.engine.batch import Batch
from llmkit.engine.request import Request
from llmkit.engine.rows import Rows


@dataclass
class Pooled:
    """Requests whose prompts ended in a step, the rows they had, and their vectors: fp32 [n, hidden], on the device."""

    requests: list[Request]
    rows: list[int]
    vectors: Tensor

    def keep(self) -> None:
        """Give each request its vector, on the host."""
        for request, vector in zip(self.requests, self.vectors.cpu().numpy()):
            request.embedding, request.hidden_sum = vector, None


def pool(batch: Batch, hidden: Tensor, rows: Rows) -> Pooled | None:
    """Take what a step computed, hidden [T, hidden size] after the final norm, into the requests that want a vector.

    Either all of it or, when memory runs out, none: then the step is computed again.
    """
    done: list[Request] = []
    vectors: list[Tensor] = []
    sums: list[tuple[Any, Tensor]] = []
    for i in np.flatnonzero(rows.pooled[batch.rows]):
        request: Any = rows.requests[batch.rows[i]]
        states = hidden[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]]
        if request.pooling == "mean":  # its first chunk begins anew, for the request may have been preempted
            before = request.hidden_sum if batch.context_lens[i] > batch.num_new[i] else 0
            sums.append((request, before + states.sum(0, dtype=torch.float32)))
        if batch.context_lens[i] == len(request.prompt):
            done.append(request)
            vectors.append(sums[-1][1] / len(request.prompt) if request.pooling == "mean" else states[-1].float())
    pooled = Pooled(done, [r.row for r in done], torch.stack(vectors)) if done else None
    for request, total in sums:
        request.hidden_sum = total
    return pooled
