"""From the host to the device without a wait.

A plain copy to a GPU first waits for all that was launched there before (torch synchronises the stream for memory that is not
pinned), so the step that is to follow the running one would be launched only when that has ended. Through pinned memory the copy
takes its turn like a kernel. torch's allocator of pinned memory keeps a buffer until its copy is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

A = TypeVar("A", np.ndarray, Tensor)
_TYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32, np.dtype(np.float32): torch.float32}


def send(values: np.ndarray, device: torch.device) -> Tensor:
    """The values on the device. On a CPU both are the same memory; on a GPU the host may change its own at once."""
    return _staged(values, device).to(device, non_blocking=True)


def send_all(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """As `send`, by one copy: each costs the host ten microseconds or more, for which a first token waits. Nothing is shared."""
    counts = [-(-values.nbytes // 8) for values in arrays]
    staged = torch.empty(sum(counts), dtype=torch.int64, pin_memory=device.type == "cuda")
    for values, part in zip(arrays, cut(staged.numpy(), counts)):
        part.view(values.dtype)[: values.size] = values.ravel()
    there = cut(staged.to(device, non_blocking=True), counts)
    return [part.view(_TYPES[values.dtype])[: values.size].view(values.shape) for values, part in zip(arrays, there)]


def cut(whole: A, lengths: Iterable[int]) -> Iterator[A]:
    """Parts of these lengths, from the beginning. A first token waits for this, and `np.split` takes ten times as long."""
    begin = 0
    for length in lengths:
        yield whole[begin : begin + length]
        begin += length


def fill(target: Tensor, values: np.ndarray) -> None:
    """Write values over a tensor of the same shape."""
    target.copy_(_staged(values, target.device), non_blocking=True)


def _staged(values: np.ndarray, device: torch.device) -> Tensor:
    host = torch.from_numpy(values)
    return host.pin_memory() if device.type == "cuda" else host
